"""Breakdown: where the time of one step went on each rank.

A receive is posted long before its message is sent, so how long a transfer took shows only beside the sender's clock:
from when the sender handed it over to when it was there. Of a wait, what comes before the hand-over is waiting for the
other rank (the bubble), what comes after it is exposed communication.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..schedule.op import COMPUTE, COPIES, FB, REDUCE, STEP, B, F, I, W
from ..schedule.records import DATA, DRAIN, FLUSH, LOSS, OP, PHASE, RECEIVE, REDUCTION, SEND, BatchRecord, Mark

WAITING, COMMUNICATION, REDUCING, OPTIMIZER = "waiting", "communication", "reduction", "optimizer"
DATA_TIME, OTHER = "data", "other"
#: What a step divides into; each is seconds that nothing else ran on the rank's compute stream.
CATEGORIES = (F, I, W, B, FB, WAITING, COMMUNICATION, REDUCING, OPTIMIZER, DATA_TIME, OTHER)
STALL = 5e-5  #: seconds; a shorter wait says that the message was there


class Message(NamedTuple):
    """A transfer between two ranks; `sent` and `arrived` in seconds of the first rank's clock."""

    source: int
    target: int
    mark: Mark  # SEND of the source
    sent: float
    arrived: float


@dataclass(frozen=True)
class Breakdown:
    """One step of one rank.

    Args:
        seconds: category -> seconds; they add up to the step. COMMUNICATION and REDUCING hold the exposed part.
        hidden: COMMUNICATION and REDUCING -> seconds that ran under something else.
    """

    seconds: dict[str, float]
    hidden: dict[str, float]


def messages(steps: Sequence[BatchRecord]) -> list[Message]:
    """The transfers between the ranks of one pipeline in one step.

    When a message arrived is seen where its receiver stood still for it. One that was there already is given the time
    of the fastest message of its directed edge.

    Args:
        steps: the step on each rank, on one clock.
    """
    sent = {_key(mark): (rank, mark) for rank, step in enumerate(steps) for mark in step.marks if mark.kind == SEND}
    pairs = []
    fastest: dict[tuple[int, int], float] = {}
    for target, step in enumerate(steps):
        for wait in step.marks:
            if wait.kind == RECEIVE and (found := sent.get(_key(wait))) is not None:
                source, mark = found
                pairs.append((source, target, mark, wait))
                took = max(0.0, wait.end - mark.start)
                fastest[source, target] = min(took, fastest.get((source, target), took))
    result = []
    for source, target, mark, wait in pairs:
        arrived = wait.end
        if wait.end - wait.start < STALL:
            arrived = min(max(wait.start, mark.start), mark.start + fastest[source, target])
        result.append(Message(source, target, mark, mark.start, max(arrived, mark.start)))
    return result


def _key(mark: Mark) -> tuple[bool, int, int]:
    """Whether a message goes forward, the stage that made it and its micro-batch."""
    op = mark.op
    stage = op.stage if mark.kind == SEND else op.receive().other_end().stage
    return op.is_forward, stage, op.micro


def break_down(steps: Sequence[BatchRecord]) -> list[Breakdown]:
    """Divide one step of every rank of a pipeline.

    Args:
        steps: the step on each rank, on one clock.
    """
    found = messages(steps)
    return [
        _break_down(step, [message for message in found if message.target == rank]) for rank, step in enumerate(steps)
    ]


def _break_down(step: BatchRecord, received: Sequence[Message]) -> Breakdown:
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    ops = [mark for mark in step.marks if mark.kind == OP]
    for mark in ops:
        seconds[category(mark)] += mark.end - mark.start
    sent = {_key(message.mark): message.sent for message in received}
    exposed = 0.0  # of the messages
    for mark in step.marks:
        length = mark.end - mark.start
        if mark.kind == RECEIVE:
            after = max(0.0, mark.end - max(mark.start, sent.get(_key(mark), mark.end)))
            exposed += after
            seconds[COMMUNICATION] += after
            seconds[WAITING] += length - after
        elif mark.kind in _OUTSIDE:
            seconds[_OUTSIDE[mark.kind]] += length
    drained = [mark for mark in step.marks if mark.kind == DRAIN]
    for mark in drained:
        seconds[REDUCING] += mark.end - mark.start
        seconds[OPTIMIZER] -= mark.end - mark.start  # it lies within STEP
    in_phases = _within_ops(ops, [mark for mark in step.marks if mark.kind == PHASE], seconds)
    seconds[OTHER] = step.end - step.start - sum(seconds.values())
    transfers = sum(message.arrived - message.sent for message in received)
    hidden = {COMMUNICATION: max(0.0, transfers - exposed) + in_phases, REDUCING: _hidden_reduction(step, drained)}
    return Breakdown(seconds, hidden)


_OUTSIDE = {SEND: COMMUNICATION, FLUSH: COMMUNICATION, LOSS: WAITING, DATA: DATA_TIME}


def category(mark: Mark) -> str:
    """Where the time of an op counts."""
    kind = mark.op.kind
    if kind in COPIES:
        return COMMUNICATION
    return kind if kind in COMPUTE else {REDUCE: REDUCING, STEP: OPTIMIZER}[kind]


def _within_ops(ops: Sequence[Mark], phases: Sequence[Mark], seconds: dict[str, float]) -> float:
    """Move the waits for transfers within layers from their ops to COMMUNICATION; returns what was hidden of them."""
    hidden, starts = 0.0, [mark.start for mark in ops]
    for phase in phases:
        length = max(0.0, phase.end - phase.start)
        waited = min(phase.waited, length)
        at = bisect_right(starts, phase.end - waited / 2) - 1
        if at < 0 or ops[at].end < phase.end - waited:
            waited = 0.0
        else:
            seconds[category(ops[at])] -= waited
            seconds[COMMUNICATION] += waited
        hidden += length - waited
    return hidden


def _hidden_reduction(step: BatchRecord, drained: Iterable[Mark]) -> float:
    waits, hidden = list(drained), 0.0
    for start, end, _ in reductions(step):
        hidden += end - start - sum(max(0.0, min(end, w.end) - max(start, w.start)) for w in waits)
    return hidden


def reductions(step: BatchRecord) -> list[tuple[float, float, Mark]]:
    """(start, end, mark) of each reduction of gradients, one after another as they run."""
    found: list[tuple[float, float, Mark]] = []
    until = step.start
    for mark in sorted((mark for mark in step.marks if mark.kind == REDUCTION), key=lambda mark: mark.end):
        found.append((min(max(mark.start, until), mark.end), mark.end, mark))
        until = mark.end
    return found
