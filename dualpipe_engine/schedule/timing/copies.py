"""Copies between device and host: two streams of each rank beside its computation, one out and one back."""

from __future__ import annotations

from collections.abc import Sequence

from ..op import COPIES, OFFLOAD, F, Op, atoms
from ..timeline import Span
from .costs import CostModel


class CopyStreams:
    """When the copies of a plan run.

    A copy out begins when its F has ended and the one before it is done, and its OFFLOAD waits for its end. A copy back
    begins at its RELOAD, when the one before it is done, and the backward waits for its end.

    Args:
        programs: with the ops of `COPIES`.
        costs: costs of the stages.
    """

    def __init__(self, programs: Sequence[Sequence[Op]], costs: CostModel) -> None:
        self._costs = costs
        self._leaves = {(op.stage, op.micro) for program in programs for op in program if op.kind == OFFLOAD}
        self._out = [0.0] * len(programs)
        self._back = [0.0] * len(programs)
        self._copied: dict[tuple[int, int], tuple[float, float]] = {}  # start and end of the copy out
        self._there: dict[tuple[int, int], float] = {}

    def computed(self, rank: int, op: Op, end: float) -> None:
        """`op` has ended: what its F has kept begins to leave."""
        for kind, stage, micro, _ in atoms(op):
            if kind == F and (stage, micro) in self._leaves:
                start = max(end, self._out[rank])
                self._out[rank] = start + self._costs.copy_at(stage)
                self._copied[stage, micro] = start, self._out[rank]

    def step(self, rank: int, op: Op, now: float) -> tuple[Span, float]:
        """Run an OFFLOAD or RELOAD of a rank that is free at `now`: the copy, and when the rank goes on."""
        assert op.kind in COPIES
        key = op.stage, op.micro
        if op.kind == OFFLOAD:
            start, end = self._copied[key]
            return Span(rank, op, start, end), max(now, end)
        start = max(now, self._back[rank])
        end = self._back[rank] = self._there[key] = start + self._costs.copy_at(op.stage)
        return Span(rank, op, start, end), now

    def back(self, op: Op) -> float:
        """When what `op` needs is back; 0 where it has not left."""
        return max(self._there.get((part.stage, part.micro), 0.0) for part in atoms(op) if part.kind != F)
