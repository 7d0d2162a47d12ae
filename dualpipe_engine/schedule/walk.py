"""Walk: run the programs of all ranks, each op as soon as what it needs is there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from .op import Op

Attempt = Callable[[int, int], int | Collection[int]]
"""Called with a rank and the position of its next op. Where a result is missing: its key, a number. Else it has run the
op: the keys of the results that the op has made."""


class Walked(NamedTuple):
    """Where a walk has ended.

    Args:
        at: the position in each rank's program that it has come to; its length where the rank is through.
        waiting: key of a missing result -> the ranks that wait for it; empty where all are through.
    """

    at: list[int]
    waiting: dict[int, list[int]]


def walk(programs: Sequence[Sequence[Op]], attempt: Attempt) -> Walked:
    """Go through all programs; a rank goes on until it waits, and again when what it waits for has been made."""
    at = [0] * len(programs)
    waiting: dict[int, list[int]] = {}
    runnable = list(range(len(programs)))
    while runnable:
        rank = runnable.pop()
        for position in range(at[rank], len(programs[rank])):
            made = attempt(rank, position)
            if isinstance(made, int):
                waiting.setdefault(made, []).append(rank)
                at[rank] = position
                break
            for key in made:
                runnable += waiting.pop(key, ())
        else:
            at[rank] = len(programs[rank])
    return Walked(at, waiting)
