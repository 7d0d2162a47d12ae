"""Emitter: writes the program of one rank that works on two phases, leaving out micro-batches that do not exist."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice, repeat, starmap

from ..op import FB, B, F, I, Op, W

_new = tuple.__new__  # an Op's own has names of arguments to look at


class Emitter:
    """Collects the program of one rank from steps like "forward of phase 0".

    It numbers the micro-batches of each phase, and queues the W of every I, first in, first out. Steps beyond the last
    micro-batch of a phase stand for nothing: a pair that lost one half becomes the other half alone, and the W of a
    missing I is skipped when its turn comes.

    Args:
        stages: the stage that the rank runs in each phase.
        micros: the micro-batches of each phase, in order.

    Attributes:
        ops: the program so far.
    """

    def __init__(self, stages: Sequence[int], micros: Sequence[Sequence[int]]) -> None:
        self.ops: list[Op] = []
        self._forward = [_numbered(F, stage, ids) for stage, ids in zip(stages, micros, strict=True)]
        self._backward = [_numbered(B, stage, ids) for stage, ids in zip(stages, micros, strict=True)]
        self._pending: deque[Op | None] = deque()

    def repeat(self, times: int, *steps: tuple[str, int]) -> None:
        """Append the steps `times` times. A step is a kind and a phase: `(FB, p)` pairs F of p with B of the other
        phase, `(W, _)` runs the oldest queued W."""
        rounds = zip(*(self._next(kind, phase) for kind, phase in steps), strict=False)
        self.ops += filter(None, chain.from_iterable(islice(rounds, times)))

    def _next(self, kind: str, phase: int) -> Iterator[Op | None]:
        """The next ones of a step."""
        if kind == W:
            return starmap(self._pending.popleft, repeat(()))
        if kind == F:
            return self._forward[phase]
        if kind == B:
            return self._backward[phase]
        if kind == I:
            return map(self._split, self._backward[phase])
        return map(_paired, self._forward[phase], self._backward[1 - phase])

    def _split(self, whole: Op | None) -> Op | None:
        self._pending.append(whole and Op(W, whole.stage, whole.micro))
        return whole and Op(I, whole.stage, whole.micro)


def _paired(forward: Op | None, backward: Op | None) -> Op | None:
    if forward and backward:
        return _new(Op, (FB, forward[1], forward[2], (forward, backward)))
    return forward or backward


def _numbered(kind: str, stage: int, micros: Sequence[int]) -> Iterator[Op | None]:
    each = zip(repeat(kind), repeat(stage), micros, repeat(()), strict=False)
    return chain(map(_new, repeat(Op), each), repeat(None))
