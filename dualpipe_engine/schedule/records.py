"""Records: what each rank did in the steps that a profiler keeps, as it comes from the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .op import Op

# Kinds of marks. OP to LOSS follow each other on a rank; REDUCTION and PHASE run beside them.
OP = "op"  #: an op of the program
RECEIVE = "receive"  #: stood still for the input of `op`
SEND = "send"  #: handed over the result of `op`
FLUSH = "flush"  #: stood still for sends at the end of the schedule
DATA = "data"  #: read inputs or labels of `op`
DRAIN = "drain"  #: stood still for reductions, within the op STEP
LOSS = "loss"  #: averaged the loss over all ranks
REDUCTION = "reduction"  #: a reduction of gradients, from its start to when it was seen to be done
PHASE = "phase"  #: a transfer within a layer


class Mark(NamedTuple):
    """A stretch of time on one rank.

    Args:
        kind: one of the kinds of this module.
        op: what it belongs to.
        start: seconds of the rank's monotonic clock, as is `end`.
        end: see `start`.
        name: of the phase, for PHASE.
        waited: seconds that the computation stood still for it, for PHASE.
    """

    kind: str
    op: Op
    start: float
    end: float
    name: str = ""
    waited: float = 0.0


class BatchRecord(NamedTuple):
    """One step of one rank, from the start of the schedule until the mean loss is known."""

    start: float
    end: float
    marks: Sequence[Mark]

    def shifted(self, seconds: float) -> BatchRecord:
        """The same on a clock that shows `seconds` more."""
        marks = [mark._replace(start=mark.start + seconds, end=mark.end + seconds) for mark in self.marks]
        return BatchRecord(self.start + seconds, self.end + seconds, marks)


@dataclass(frozen=True)
class RankRecord:
    """What one rank kept.

    Args:
        rank: position in its pipeline.
        replica: which pipeline.
        host: name of its machine.
        steps: the last steps, oldest first; the same number on all ranks.
        memory_bytes: most bytes it has held: of the accelerator's tensors, else of the process.
        clock: seconds that its clock is ahead of that of the first rank.
        clock_error: the most that `clock` can be wrong by, seconds.
        facts: what is known of the job, for the doctor.
    """

    rank: int
    replica: int
    host: str
    steps: Sequence[BatchRecord]
    memory_bytes: int = 0
    clock: float = 0.0
    clock_error: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def aligned(self) -> RankRecord:
        """The same with all times on the clock of the first rank."""
        return replace(self, steps=[step.shifted(-self.clock) for step in self.steps])
