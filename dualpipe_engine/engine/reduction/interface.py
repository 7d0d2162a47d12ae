"""What every reduction of gradients over the copies of a stage is: its steps, and what to reduce when.

A stage's gradients are complete on a rank after its last W, and their reduction starts there, beside the rest of the
schedule (`SideStream`). Weights that are tied across ranks wait for the step, because their copies are added up first.
"""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...schedule.op import REDUCE
from ..context import Context
from .freezing import TrainedParams


class Reduction(Protocol):
    """What a `GradientTail` does with gradients before the optimizer steps."""

    def begin(self) -> None:
        """Start of a batch."""

    def accumulate(self, stage: int) -> None:
        """A B or W of `stage` has added to `param.grad`."""

    def reduce(self, stage: int) -> None:
        """The last B or W of `stage` on this rank has run."""

    def finish(self) -> None:
        """All gradients are where the optimizer's step looks for them, reduced."""

    def buffers(self) -> list[Tensor]:
        """Gradients that are held elsewhere than in the parameters' own attributes."""

    def held(self) -> list[Tensor]:
        """Of these the ones that stay until the step."""


class StageParams:
    """The parameters of a rank that reductions expect (`TrainedParams.reduced`), by when their gradients are complete.

    Attributes:
        all: in the order of the module, which is that of the twin.
        of_stage: stage -> its parameters; one that two stages of the rank share is listed with both.
        closed_by: stage -> parameters that are complete after the REDUCE of the stage.
        late: those that only the step may reduce: tied across ranks, or in no stage.
        tied: (parameter, process group) of the former.
    """

    def __init__(self, context: Context, trained: TrainedParams) -> None:
        self.all = params = trained.reduced
        expected = set(params)
        pairs: list[tuple[nn.Parameter, ProcessGroup]] = context.module.get_tied_weights_and_groups()
        self.tied = [(param, group) for param, group in pairs if dist.get_world_size(group) > 1 and param in expected]
        tied = {param for param, _ in self.tied}
        by_stage = context.params_of_stages()
        order = [op.stage for op in context.plan.programs[context.place.rank] if op.kind == REDUCE]
        closing = {param: stage for stage in order for param in by_stage[stage] if param not in tied}
        self.of_stage = {stage: [p for p in params if p in by_stage[stage]] for stage in by_stage}
        self.closed_by = {stage: [p for p in params if closing.get(p) == stage] for stage in by_stage}
        self.late = [param for param in params if param not in closing]
