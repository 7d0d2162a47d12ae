"""Whether ranks can make their transfers, by running little of what repeats.

In the steady state the programs of ranks repeat: the events of a rank are those of a period before, of transfers that
are as many further as their edge has made in it. The transfers of an edge start one after the other, so that how far
the ranks have come says all about them: once all ranks have gone through a period of theirs, they stand as they stood
before it, and go through the next one in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..columns import Ints
from .queues import FACTORS, RESERVED, STARTS, Queues


class _Period(NamedTuple):
    """How the events of a rank repeat: behind each from `begin` to `end` the same follows, `length` events further."""

    begin: int
    length: int
    end: int


_NEVER = _Period(0, 1, 0)


def finishes(queues: Queues, moved: Ints) -> bool:
    """Whether every rank comes to its end, as `queues.run()` says; the queues stand where that would leave them.

    Args:
        queues: at the beginning.
        moved: of each edge the transfers of a period, if its events repeat after as many.
    """
    repeats = _Repeats(queues, moved)
    if repeats.begun() and repeats.run_one():
        queues.leap(*repeats.left())
    return queues.run()


class _Repeats:
    """The steady state of all ranks.

    Args:
        queues: what runs them.
        moved: see `finishes`.
    """

    def __init__(self, queues: Queues, moved: Ints) -> None:
        events, self._queues, self._moved = queues.events, queues, moved
        self._edge = np.repeat(np.arange(len(moved)), [each.stop - each.start for each in events.edges])
        self._periods = list(map(self._period, events.programs))
        self._at: Sequence[int] = ()

    def _period(self, program: Ints) -> _Period:
        """How the events in the middle repeat."""
        if not len(program):
            return _NEVER
        kinds, numbers = np.divmod(program, len(self._edge))
        edges, middle = self._edge[numbers], len(program) // 2
        further = self._moved[edges]
        again = np.flatnonzero(program[middle:] == program[middle] + further[middle])
        if len(again) != 1 or not again[0]:
            return _NEVER
        length = int(again[0])
        before, behind = slice(None, -length), slice(length, None)
        same = (kinds[before] == kinds[behind]) & (edges[before] == edges[behind])
        same &= numbers[before] + further[before] == numbers[behind]
        breaks = np.flatnonzero(~same)
        nearest = np.searchsorted(breaks, middle)
        begin = breaks[nearest - 1] + 1 if nearest else 0
        end = breaks[nearest] if nearest < len(breaks) else len(same)
        return _Period(int(begin), length, int(end))

    def begun(self) -> bool:
        """Run until all ranks repeat; whether they do, for more than a period."""
        if any(begin + 3 * length > end for begin, length, end in self._periods):
            return False
        # Ranks begin one after the other, those that wait for the others within a period.
        self._queues.run([begin + 2 * length for begin, length, _ in self._periods])
        self._at = self._queues.at()
        return all(at >= begin for at, (begin, _, _) in zip(self._at, self._periods, strict=True))

    def run_one(self) -> bool:
        """Run a period; whether every rank comes to its end, and has started each transfer of it."""
        ends = [at + length for at, (_, length, _) in zip(self._at, self._periods, strict=True)]
        return self._queues.run(ends) and self._starts_all(ends)

    def _starts_all(self, ends: Sequence[int]) -> bool:
        both = np.zeros_like(self._moved)
        for program, begin, end in zip(self._queues.events.programs, self._at, ends, strict=True):
            kinds, numbers = np.divmod(program[begin:end], len(self._edge))
            starts = numbers[(kinds == FACTORS[STARTS]) | (kinds == FACTORS[RESERVED])]
            started = np.bincount(self._edge[starts], minlength=len(both))
            if ((started > 0) & (started != self._moved)).any():
                return False
            both += started
        return bool((both == 2 * self._moved).all())

    def left(self) -> tuple[list[int], list[int]]:
        """What remains of the steady state in whole periods: events of each rank, and transfers of each edge."""
        each = zip(self._at, self._periods, strict=True)
        times = min((end - at) // length for at, (_, length, end) in each)
        return [times * length for _, length, _ in self._periods], (times * self._moved).tolist()
