"""Decoder layers of a small Qwen3-MoE of transformers, whose experts ranks share by DeepSpeed's AutoEP, in the phases
that are found by their structure; computation can be added to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeRotaryEmbedding

from dualpipe_engine.models.autoep.decoder import offer_phases
from dualpipe_engine.models.autoep.find import find_blocks
from dualpipe_engine.models.autoep.layer import SharedMoE

LENGTH, TOP_K = 64, 2

Busy = Callable[[torch.Tensor], torch.Tensor]


class Block(torch.nn.Module):
    """A decoder layer that takes a hidden state, `[batch, length, hidden]`."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.block = Qwen3MoeDecoderLayer(config, 0)
        self.rotary = Qwen3MoeRotaryEmbedding(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = self.rotary(x, torch.arange(x.shape[1])[None])
        out: torch.Tensor = self.block(x, position_embeddings=positions)
        return out


def decoder_layers(count: int, hidden: int, experts: int, busy: Busy) -> list[Block]:
    """Layers that work as long as `busy` says in their attention and in their experts, forward and backward.

    Args:
        count: of the layers.
        hidden: width.
        experts: of a layer, of all ranks.
        busy: identity that takes its time.
    """
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    sizes |= {"num_experts": experts, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 32}
    config = Qwen3MoeConfig(hidden_size=hidden, num_hidden_layers=1, attn_implementation="sdpa", **sizes)
    ranks = dist.get_world_size()
    section = parse_autoep_config(
        {"enabled": True, "autoep_size": ranks, "moe_layer_pattern": r"model\.layers\.\d+\.block\.mlp"}
    )
    torch.manual_seed(0)
    made = []
    for number in range(count):
        layer = Block(config)
        for param in layer.parameters():
            if param.dim() > 1:
                torch.nn.init.normal_(param, std=0.02)
        (found,) = find_blocks(layer, number, section)
        moe = SharedMoE(found.spec, layer.block.mlp, ranks, dist.get_rank(), found.config)
        moe.ep_group = dist.group.WORLD
        layer.block.mlp = moe
        layer.block.self_attn.register_forward_hook(lambda _, args, out: (busy(out[0]), *out[1:]))
        moe.experts.register_forward_hook(lambda _, args, out: busy(out))
        if (why := offer_phases(layer)) is not None:
            raise RuntimeError(f"the layer runs without phases: {why}")
        made.append(layer)
    return made
