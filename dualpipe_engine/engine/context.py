"""Context: what the parts of an engine share. An engine fills it in and keeps it up to date; they know no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn
from torch.distributed import ProcessGroup

from ..runtime.observer import Observer
from ..schedule.plan import Plan
from .batches.loss_sums import Totals
from .given import Optimizer
from .placing.grid import Place
from .placing.module import PlacedModule
from .placing.stages import params_of


@dataclass(frozen=True)
class Groups:
    """Process groups of a rank.

    Args:
        copies: the ranks that hold the same stages, in its pipeline and in the replicas.
        model: ranks that together hold one copy of each stage, all slices of tensor parallelism included.
    """

    copies: ProcessGroup
    model: ProcessGroup


@dataclass(frozen=True)
class Scaling:
    """How gradients become means over the copies of a stage, as the configuration of DeepSpeed says.

    Args:
        dtype: in which gradients of at most 4 bytes travel.
        before: factor before they are added up. Experts are divided by all copies too.
        after: factor after it.
    """

    dtype: torch.dtype
    before: float = 1.0
    after: float = 1.0


class Steps(NamedTuple):
    """What a step leaves to DeepSpeed's engine.

    Args:
        reduce: its own reduction of all gradients, tied ones first.
        step: its step of the optimizer.
        done: the number of steps that are done.
    """

    reduce: Callable[[], None]
    step: Callable[[], None]
    done: Callable[[], int]


@dataclass
class Context:
    """Of one engine on one rank.

    Args:
        module: the stages of this rank.
        views: stage -> the module that runs it.
        place: where the rank stands.
        plan: the lowered training plan, a new one when the number of micro-batches has changed.
        device: of the stages.
        groups: process groups.
        first_slice: whether this rank counts what all slices of tensor parallelism hold alike.
        observer: records what happens when.
        totals: sums over all ranks that travel with the loss.
        scaling: of gradients.
        partitions_gradients: whether every B and W is to be reduced by itself (ZeRO-2).
        steps: what is left to DeepSpeed.
        optimizer: DeepSpeed's; another one when a client configures it anew.
        load_report_steps: after how many steps the loads of experts are reported; None: never.
    """

    module: PlacedModule
    views: Mapping[int, PipelineModule]
    place: Place
    plan: Plan
    device: torch.device
    groups: Groups
    first_slice: bool
    observer: Observer
    totals: Totals
    scaling: Scaling
    partitions_gradients: bool
    steps: Steps
    optimizer: Optimizer
    load_report_steps: int | None

    @property
    def sums_in_fp32(self) -> bool:
        """Whether the optimizer keeps fp32 sums of gradients of its own."""
        return type(self.optimizer) is BF16_Optimizer

    def params_of_stages(self) -> dict[int, set[nn.Parameter]]:
        """Stage -> its parameters."""
        return {stage: params_of(view.forward_funcs) for stage, view in self.views.items()}
