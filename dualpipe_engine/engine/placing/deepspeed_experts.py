"""Experts of `deepspeed.moe.layer.MoE` in the files of layers, which hold those of all ranks under their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

_LIST = "deepspeed_experts."


@contextmanager
def whole_layer(moe: MoE, keep: bool) -> Iterator[None]:
    """Let state dicts hold the experts of all ranks, in host memory. Collective over those that share them.

    Args:
        moe: the layer, which is connected.
        keep: whether this rank needs them.
    """
    experts, found = moe.deepspeed_moe.experts, dict[str, Tensor]()
    own = experts.state_dict()
    for name, tensor in own.items():
        parts = [tensor.contiguous()]
        if moe.ep_size > 1:
            parts = [torch.empty_like(parts[0]) for _ in range(moe.ep_size)]
            dist.all_gather(parts, tensor.contiguous(), group=moe.deepspeed_moe.ep_group)
        for rank, part in enumerate(parts) if keep else ():
            found[_renumbered(name, rank * moe.num_local_experts)] = part.cpu()

    def put(_: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
        for name in own if keep else ():
            del state[prefix + name]
        state.update({prefix + name: tensor for name, tensor in found.items()})

    handle = experts.register_state_dict_post_hook(put)
    try:
        yield
    finally:
        handle.remove()


def load_own(moe: MoE) -> None:
    """Let a layer, which is connected, take its share of state dicts of all experts."""
    first = dist.get_rank(moe.deepspeed_moe.ep_group) * moe.num_local_experts
    share = range(first, first + moe.num_local_experts)
    moe.deepspeed_moe.experts.register_load_state_dict_pre_hook(partial(_take, share, moe.num_experts))


def _take(share: range, total: int, _: nn.Module, state: dict[str, Tensor], prefix: str, *args: object) -> None:
    listed = [name for name in state if name.startswith(prefix + _LIST)]
    if not any(name.startswith(f"{prefix}{_LIST}{total - 1}.") for name in listed):
        return  # those of this rank
    given = {name.removeprefix(prefix): state.pop(name) for name in listed}
    for name, tensor in given.items():
        if _number(name) in share:
            state[prefix + _renumbered(name, -share.start)] = tensor


def _number(name: str) -> int:
    return int(name.split(".")[1])


def _renumbered(name: str, by: int) -> str:
    kind, number, rest = name.split(".", 2)
    return f"{kind}.{int(number) + by}.{rest}"
