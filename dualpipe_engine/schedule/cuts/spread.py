"""Cuts for ranks that hold several stages, anywhere on the way: layers move away from the rank with the most work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from ..placement import Placement

Loads = tuple[int, int]  #: of the fullest rank, and the sum of the squares of rank and stage loads


def spread(even: list[int], units: Sequence[int], placement: Placement, slacks: Sequence[float]) -> list[list[int]]:
    """For each slack the bounds of a cut whose largest rank load is at most 1 + slack times the least that was found.

    Starting from `even` stages, a stage of the fullest rank gives up a layer to a stage of another rank, all borders in
    between moving by one, as long as that lowers the largest load or evens out the others. Of the cuts on this way the
    first that is within the slack is taken, since its stages are the most even ones. The way may end before the least
    of all cuts.

    Args:
        even: bounds of stages whose loads are as even as can be.
        units: weight of each layer.
        placement: which stages share a rank.
        slacks: 0 and more.
    """
    sums = [0, *accumulate(units)]
    way = [(even, _loads(even, sums, placement))]
    while True:
        bounds, loads = way[-1]
        found = [(moved, _loads(moved, sums, placement)) for moved in _moves(bounds, sums, placement)]
        best = min(found, key=lambda cut: cut[1], default=way[-1])
        if best[1] >= loads:
            break
        way.append(best)
    least = way[-1][1][0]
    return [next(cut for cut, (most, _) in way if most <= least * (1 + slack)) for slack in slacks]


def _moves(bounds: list[int], sums: Sequence[int], placement: Placement) -> Iterator[list[int]]:
    ranks = [placement.rank(stage) for stage in range(placement.num_stages)]
    work = _of_ranks(bounds, sums, placement)
    fullest = max(range(len(work)), key=lambda rank: work[rank])
    for source in placement.stages_of(fullest):
        if bounds[source + 1] - bounds[source] < 2:
            continue
        for target, rank in enumerate(ranks):
            if rank == fullest:
                continue
            first, last, step = (source + 1, target, -1) if source < target else (target + 1, source, 1)
            yield [at + step if first <= border <= last else at for border, at in enumerate(bounds)]


def _of_ranks(bounds: Sequence[int], sums: Sequence[int], placement: Placement) -> list[int]:
    return [
        sum(sums[bounds[stage + 1]] - sums[bounds[stage]] for stage in placement.stages_of(rank))
        for rank in range(placement.num_ranks)
    ]


def _loads(bounds: Sequence[int], sums: Sequence[int], placement: Placement) -> Loads:
    ranks = _of_ranks(bounds, sums, placement)
    stages = [sums[bounds[stage + 1]] - sums[bounds[stage]] for stage in range(placement.num_stages)]
    return max(ranks), sum(load * load for load in (*ranks, *stages))
