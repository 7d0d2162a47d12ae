"""A lower bound of the makespan of any plan for a pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor

from ..plan import Plan
from .costs import CostModel


def lower_bound(num_ranks: int, num_micro: int, costs: CostModel, cap: int | None = None) -> float:
    """Seconds that no `linear` or `bidirectional` plan beats.

    With h the distance of a rank from the nearer end, the rank cannot start before `start = h f`, nor run a backward
    before `first = PP f + h i`, and once it has run its last forward the batch needs `rest = h f + PP i + w` more. Say
    it runs a forwards before its first backward and x of the others in pairs; the least over a and x of the time that
    its work then takes is a bound. Transfers count nothing, and each cost counts as the least over the stages.

    Args:
        num_ranks: pipeline ranks PP.
        num_micro: micro-batches of the batch.
        costs: costs of the PP stages.
        cap: activations that a rank may hold; None: any number.

    Raises:
        PlanError: the costs are for another number of stages.
    """
    return _bound(num_ranks, range((num_ranks + 1) // 2), num_micro, costs, cap)


def plan_bound(plan: Plan, costs: CostModel, cap: int | None = None) -> float:
    """`lower_bound` for any plan with the placement of `plan`; `costs` are those of its stages.

    A rank of `parts` stages has as many times the work, and its h is the distance of its stages from the nearer end.
    """
    placement = plan.placement
    ends = [(min(stages), max(stages)) for stages in map(placement.stages_of, range(placement.num_ranks))]
    distances = sorted({min(first, placement.num_stages - 1 - last) for first, last in ends})
    return _bound(placement.num_stages, distances, plan.num_micro * placement.parts, costs, cap)


def _bound(num_stages: int, distances: Iterable[int], num_micro: int, costs: CostModel, cap: int | None) -> float:
    """The bound of ranks at these distances, each with `num_micro` forwards and backwards."""
    costs.check(num_stages)
    stages = [costs.at(stage) for stage in range(num_stages)]
    f, i, w, fb = (min(column) for column in zip(*stages, strict=True))
    bound = sum(stage[0] + stage[1] for stage in stages) + stages[0][2]  # one micro-batch there and back
    for h in distances:
        start, first, rest = h * f, num_stages * f + h * i, h * f + num_stages * i + w
        # Forwards beyond those that fit before `first` gain nothing.
        most = min(num_micro, floor((first - start) / f) + 1 if f else num_micro, num_micro if cap is None else cap)
        least = min(_work(a, num_micro, (f, i + w, fb), (start, first, rest)) for a in range(1, most + 1))
        bound = max(bound, least, start + num_micro * min(fb, f + i + w))
    return bound


def _work(ahead: int, num_micro: int, costs: tuple[float, float, float], times: tuple[float, float, float]) -> float:
    """Least makespan of a rank that runs `ahead` forwards before its first backward."""
    f, b, fb = costs
    start, first, rest = times
    first = max(first, start + ahead * f)
    if ahead == num_micro:
        return max(first + num_micro * b, start + num_micro * f + rest)
    most = num_micro - ahead
    # Convex and piecewise linear in the number of pairs: the least is at an end or next to the bend.
    bend = floor(num_micro - rest / b) if b else 0
    pairs = {0, most, *(min(max(x, 0), most) for x in (bend, bend + 1))}
    return min(first + x * fb + (most - x) * f + max(rest, (num_micro - x) * b) for x in pairs)
