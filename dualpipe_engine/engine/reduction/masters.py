"""Masters: the weights that an optimizer of DeepSpeed's keeps for itself, in flat groups and in fp32, follow those of
the module, which a program may have changed since the last step: clipped, averaged, loaded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from types import MethodType

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import set_full_hp_param
from torch import Tensor, nn

from ..given import Optimizer

_PIECE = 1 << 24  #: elements that are compared at a time, so that what this takes of the memory stays small


class Masters:
    """Those of one engine."""

    def __init__(self) -> None:
        self._seen: list[int] = []

    @staticmethod
    def link(optimizer: Optimizer, module: nn.Module) -> None:
        """Let `deepspeed.utils.safe_set_full_fp32_param` set the weight with its master, which would follow it back;
        DeepSpeed links both anew when it loads.

        Args:
            optimizer: of the engine.
            module: whose weights it steps.
        """
        if not hasattr(optimizer, "_link_all_hp_params"):
            return
        link = optimizer._link_all_hp_params

        def set_both() -> None:
            for param in module.parameters():
                if hasattr(param, "set_full_hp_param"):
                    param.set_full_hp_param = MethodType(_set_both, param)  # type: ignore[attr-defined]

        def link_again() -> None:
            link()
            set_both()

        set_both()
        optimizer._link_all_hp_params = link_again

    @torch.no_grad()
    def follow(self, optimizer: Optimizer) -> None:
        """Take the weights that have changed; a master whose rounded value is its weight stays as precise as it is.

        Those in host memory are looked at where torch counts a change of their weights, which it does not of `.data`.

        Args:
            optimizer: of the engine; one of torch steps the weights themselves.
        """
        if getattr(optimizer, "cpu_offload", False):
            before, self._seen = self._seen, [param._version for group in optimizer.bit16_groups for param in group]
            if self._seen == before:
                return
        for master, weight in _pairs(optimizer):
            for kept, now in zip(master.view(-1).split(_PIECE), weight.view(-1).split(_PIECE), strict=True):
                _take(kept, now.to(kept.device))


def _set_both(param: nn.Parameter, value: Tensor, state: str | None = None) -> None:
    """Set the master of a parameter and its weight, or a state of the optimizer.

    Args:
        param: of the module.
        value: of its shape.
        state: of the optimizer, such as "exp_avg".
    """
    set_full_hp_param(param, value, state)
    if state is None:
        with torch.no_grad():
            param.copy_(value)


def _take(master: Tensor, weight: Tensor) -> None:
    if master.dtype == weight.dtype:
        master.copy_(weight)
    else:
        master.copy_(torch.where(master.to(weight.dtype) == weight, master, weight))


def _pairs(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each part that this rank steps: the master, and the weight that is made from it."""
    if isinstance(optimizer, BF16_Optimizer) and not optimizer.using_real_optimizer:
        return  # of an engine that only evaluates
    if isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        flat = (
            (optimizer.fp32_groups_flat_partition, optimizer.bf16_partitioned_groups)
            if isinstance(optimizer, BF16_Optimizer)
            else (optimizer.single_partition_of_fp32_groups, optimizer.parallel_partitioned_bit16_groups)
        )
        for master, parts, group in zip(*flat, optimizer.real_dp_process_group, strict=True):
            yield master, parts[dist.get_rank(group)]
    elif isinstance(optimizer, FP16_Optimizer):
        yield from zip(optimizer.fp32_groups_flat, optimizer.fp16_groups_flat, strict=True)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        yield from zip(chain(*optimizer.fp32_groups), chain(*optimizer.fp16_groups), strict=True)
