"""What a configuration of transformers' DeepSeek-V3 says, in the fields of `MoEConfig`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .positions import Yarn

if TYPE_CHECKING:
    from transformers import DeepseekV3Config

#: What the layers do not do otherwise.
_ONLY: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0,
    "tie_word_embeddings": False,
    "output_router_logits": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "quantization_config": None,
}
_ROPE = ("default", "yarn")


def fields_of(config: DeepseekV3Config) -> dict[str, Any]:
    """Field -> value; see `MoEConfig.from_hf`."""
    only = _ONLY | {"num_key_value_heads": config.num_attention_heads}
    for name, wanted in only.items():
        found = getattr(config, name, wanted)
        if (found or None) != (wanted or None):
            raise ConfigError(
                f"{name} of the configuration must be {wanted!r}, got {found!r}: change it, or use an adapter"
            )
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"rope_parameters of the configuration must be of type {' or '.join(_ROPE)} for whole heads, got {rope}"
        )
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "blocks": config.num_hidden_layers,
        "dense_blocks": min(config.first_k_dense_replace or 0, config.num_hidden_layers),
        "heads": config.num_attention_heads,
        "attention": "latent",
        "head": config.qk_nope_head_dim,
        "value_head": config.v_head_dim,
        "rotary": config.qk_rope_head_dim,
        "interleaved": bool(config.rope_interleave),
        "yarn": _yarn(config, rope) if kind == "yarn" else None,
        "kv_rank": config.kv_lora_rank,
        "q_rank": config.q_lora_rank,
        "theta": float(rope["rope_theta"]),
        "norm_eps": config.rms_norm_eps,
        "init_std": config.initializer_range,
        "dense_inner": config.intermediate_size,
        "experts": config.n_routed_experts,
        "top_k": config.num_experts_per_tok,
        "shared_experts": config.n_shared_experts,
        "expert_inner": config.moe_intermediate_size,
        "groups": config.n_group or 1,
        "kept_groups": config.topk_group or 1,
        "balancing": "bias",
        "routed_scale": config.routed_scaling_factor,
        "normalised": bool(config.norm_topk_prob),
        "mtp_depth": config.num_mtp_layers or 0,
    }


def _yarn(config: DeepseekV3Config, rope: dict[str, Any]) -> Yarn:
    length = rope["original_max_position_embeddings"]
    return Yarn(
        factor=rope.get("factor") or config.max_position_embeddings / length,
        length=length,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        attention_factor=rope.get("attention_factor"),
        truncate=rope.get("truncate", True),
    )
