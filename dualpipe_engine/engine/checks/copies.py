"""Twins: all copies of a parameter hold the same bits after every step, or something went wrong."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param

from ...comm.from_all import from_all
from ...errors import PipelineRuntimeError


def check_twins(module: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Compare the copies of every parameter by hash, experts aside, which other ranks share. Collective over `group`.

    Args:
        module: this rank's stages.
        group: the ranks that hold the same stages.

    Raises:
        PipelineRuntimeError: copies differ; the first parameter and the ranks are named.
    """
    hashes = {name: _hash(param) for name, param in module.named_parameters() if not is_moe_param(param)}
    hashes_of_ranks = from_all(hashes, group)
    for name in hashes:
        ranks_of: dict[int, list[int]] = {}
        for index, each in enumerate(hashes_of_ranks):
            ranks_of.setdefault(each[name], []).append(dist.get_global_rank(group, index))
        if len(ranks_of) > 1:
            sides = " differ from ranks ".join(", ".join(map(str, ranks)) for ranks in ranks_of.values())
            raise PipelineRuntimeError(
                f"the copies of parameter {name} have drifted apart: ranks {sides}; go back to a checkpoint"
            )


def _hash(param: torch.Tensor) -> int:
    raw = param.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(raw.numpy().tobytes())
