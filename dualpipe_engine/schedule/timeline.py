"""Timeline: when each op ran. One type for simulated and for measured schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .op import COMPUTE, Op


class Span(NamedTuple):
    """One op on one rank; `start` and `end` in seconds (or in the unit of the cost model)."""

    rank: int
    op: Op
    start: float
    end: float


class Hop(NamedTuple):
    """One measured transfer.

    Args:
        rank: that posted it.
        name: what it belongs to, such as "dispatch" or "send".
        start: when it was posted, seconds.
        end: when it was seen to be finished, seconds.
        waited: seconds that the rank stood still for it.
        size: bytes that the rank sent.
    """

    rank: int
    name: str
    start: float
    end: float
    waited: float
    size: int


class Timeline:
    """Spans of all ranks of one pipeline over one batch.

    Args:
        num_ranks: ranks of the pipeline; some may have no span.
        spans: in any order between ranks, in program order within a rank.
    """

    def __init__(self, num_ranks: int, spans: Sequence[Span]) -> None:
        self.num_ranks = num_ranks
        self.spans = spans

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        if not self.spans:
            return 0.0
        return max(span.end for span in self.spans) - min(span.start for span in self.spans)

    def busy(self) -> list[float]:
        """Time each rank spends in compute ops."""
        total = [0.0] * self.num_ranks
        for span in self.spans:
            if span.op.kind in COMPUTE:
                total[span.rank] += span.end - span.start
        return total

    def bubble(self) -> list[float]:
        """Idle time of each rank: makespan minus compute."""
        makespan = self.makespan
        return [makespan - busy for busy in self.busy()]

    def of_rank(self, rank: int) -> list[Span]:
        return [span for span in self.spans if span.rank == rank]
