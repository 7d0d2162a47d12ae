"""Twins: all copies of a parameter hold the same bits after every step, or something went wrong."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param

from ...errors import PipelineRuntimeError


def check_twins(module: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Compare the copies of every parameter by hash, experts aside, which other ranks share. Collective over `group`.

    Args:
        module: this rank's stages.
        group: the ranks that hold the same stages.

    Raises:
        PipelineRuntimeError: copies differ; the first parameter and the ranks are named.
    """
    mine = {name: _hash(param) for name, param in module.named_parameters() if not is_moe_param(param)}
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    for name in mine:
        held: dict[int, list[int]] = {}
        for index, each in enumerate(found):
            held.setdefault(each[name], []).append(dist.get_global_rank(group, index))
        if len(held) > 1:
            sides = " differ from ranks ".join(", ".join(map(str, ranks)) for ranks in held.values())
            raise PipelineRuntimeError(
                f"the copies of parameter {name} have drifted apart: ranks {sides}; go back to a checkpoint"
            )


def _hash(param: torch.Tensor) -> int:
    raw = param.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(raw.numpy().tobytes())
