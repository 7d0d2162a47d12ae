"""The configuration of transformers' DeepSeek-V3 that says what a `MoEConfig` does."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from .config import MoEConfig


def hf_of(config: MoEConfig) -> dict[str, Any] | None:
    """The config.json of transformers' DeepSeek-V3 with which it is the same model; None where it has no such. What the
    layers do not need (tokens of begin and end) is left at its defaults."""
    if config.attention != "latent" or config.balancing != "bias" or config.kv_heads not in (None, config.heads):
        return None
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.theta}
    positions = {}
    if config.yarn is not None:
        yarn = {name: value for name, value in asdict(config.yarn).items() if value is not None}
        length = yarn.pop("length")
        rope |= {"rope_type": "yarn", "original_max_position_embeddings": length} | yarn
        positions = {"max_position_embeddings": round(length * config.yarn.factor)}
    eps = torch.finfo(torch.float32).eps if config.norm_eps is None else config.norm_eps
    std = {} if config.init_std is None else {"initializer_range": config.init_std}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.blocks,
        "first_k_dense_replace": config.dense_blocks,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "qk_nope_head_dim": config.head,
        "v_head_dim": config.head if config.value_head is None else config.value_head,
        "qk_rope_head_dim": config.rotary,
        "rope_interleave": config.interleaved,
        "rope_parameters": rope,
        "kv_lora_rank": config.kv_rank,
        "q_lora_rank": config.q_rank,
        "rms_norm_eps": eps,
        "intermediate_size": config.dense_inner,
        "n_routed_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "n_shared_experts": config.shared_experts,
        "moe_intermediate_size": config.expert_inner,
        "n_group": config.groups,
        "topk_group": config.kept_groups,
        "routed_scaling_factor": config.routed_scale,
        "norm_topk_prob": config.top_k > 1 if config.normalised is None else config.normalised,
        "num_mtp_layers": config.mtp_depth,
        **positions,
        **std,
    }
