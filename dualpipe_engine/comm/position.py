"""Position: where a rank is in its program, written by the thread that runs it and read by the one that watches."""

from __future__ import annotations

from dataclasses import dataclass

from ..schedule.op import B, F, I, Op, atoms
from ..schedule.plan import Plan


@dataclass
class Position:
    """Attributes are set one at a time, without a lock: a reader sees each as it is at some moment.

    Args:
        plan: the plan that runs; None between batches.
        op: what runs.
        awaits: what is waited for: pipeline rank, stage that makes it, micro-batch, and whether it is a gradient.
        pipeline: global ranks of the pipeline's ranks.
    """

    plan: Plan | None = None
    op: Op | None = None
    awaits: tuple[int, int, int, bool] | None = None
    pipeline: tuple[int, ...] = ()

    def awaited(self) -> tuple[int, str] | None:
        """The global rank that is waited for, and the op of its program that is."""
        plan, awaits = self.plan, self.awaits
        if plan is None or awaits is None or not self.pipeline:
            return None
        source, stage, micro, gradient = awaits
        kinds = (B, I) if gradient else (F,)
        for op in plan.programs[source]:
            if any((part.stage, part.micro) == (stage, micro) and part.kind in kinds for part in atoms(op)):
                return self.pipeline[source], str(op)
        return self.pipeline[source], f"{stage}{kinds[0]}{micro}"
