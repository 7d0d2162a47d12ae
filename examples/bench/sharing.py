"""Decoder layers of small models of transformers whose ranks share sequences, in the phases that are found by their
structure; computation can be added to them."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from decoder import Busy
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dualpipe_engine.adapters import get_model_adapter
from dualpipe_engine.models.autoep.decoder import offer_phases
from dualpipe_engine.models.autoep.find import find_blocks
from dualpipe_engine.models.autoep.layer import SharedMoE

LENGTH, HEADS, GROUP, WIDTH = 64, 16, 8, 16  #: tokens of a rank, heads of queries, those for one of keys, their width
TOP_K = 1
ATTENTION = "busy_sdpa"


class Projection(torch.nn.Module):
    """A projection that takes its time."""

    def __init__(self, inner: torch.nn.Module, busy: Busy) -> None:
        super().__init__()
        self.inner, self.busy = inner, busy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.busy(self.inner(x))


def sharing_layers(count: int, hidden: int, experts: int, busy: Busy) -> list[Any]:
    """Layers of a Llama, or with experts of a Qwen3-MoE under AutoEP, that work as long as `busy` says in each
    computation around an exchange but the last, forward and backward.

    Args:
        count: of the layers.
        hidden: width.
        experts: of a layer, of all ranks; 0: none.
        busy: identity that takes its time.
    """
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)

    def attend(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        mixed, _ = sdpa_attention_forward(*args, **kwargs)
        return busy(mixed), None

    AttentionInterface.register(ATTENTION, attend)
    model = AutoModelForCausalLM.from_config(_config(max(2, count), hidden, experts))  # a chain has two
    for layer in model.model.layers:
        layer.self_attn.q_proj = Projection(layer.self_attn.q_proj, busy)
        if experts:
            layer.self_attn.o_proj = Projection(layer.self_attn.o_proj, busy)
    made = [spec.build() for spec in get_model_adapter(model).to_layer_specs()[1 : count + 1]]
    for number, layer in enumerate(made, 1):
        layer.share_sequences(dist.group.WORLD)
        waits = _share_experts(layer, number, busy) if experts else None
        if (why := waits or layer.offer_exchanges(dist.group.WORLD)) is not None:
            raise RuntimeError(f"the layer runs without phases: {why}")
    return made


def _config(count: int, hidden: int, experts: int) -> PreTrainedConfig:
    sizes: dict[str, Any] = {"hidden_size": hidden, "num_hidden_layers": count, "vocab_size": 64, "head_dim": WIDTH}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // GROUP, "attn_implementation": ATTENTION}
    if not experts:
        return LlamaConfig(**sizes, intermediate_size=hidden)
    return Qwen3MoeConfig(**sizes, num_experts=experts, num_experts_per_tok=TOP_K, moe_intermediate_size=32)


def _share_experts(layer: Any, number: int, busy: Busy) -> str | None:
    """Let ranks share the experts of a layer, which are busy then; why it offers no phases for them."""
    ranks = dist.get_world_size()
    (found,) = find_blocks(layer, number, parse_autoep_config({"enabled": True, "autoep_size": ranks}))
    path, _, name = found.path.rpartition(".")
    moe = SharedMoE(found.spec, layer.get_submodule(found.path), ranks, dist.get_rank(), found.config)
    moe.ep_group = dist.group.WORLD
    setattr(layer.get_submodule(path), name, moe)
    moe.experts.register_forward_hook(lambda _, args, out: busy(out))
    return offer_phases(layer)
