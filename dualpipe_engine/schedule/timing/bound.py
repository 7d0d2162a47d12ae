"""A lower bound of the makespan of any plan for a pipeline."""

from __future__ import annotations

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
    costs.check(num_ranks)
    stages = [costs.at(stage) for stage in range(num_ranks)]
    f, i, w, fb = (min(column) for column in zip(*stages, strict=True))
    bound = sum(stage[0] + stage[1] for stage in stages) + stages[0][2]  # one micro-batch there and back
    for h in range((num_ranks + 1) // 2):
        start, first, rest = h * f, num_ranks * f + h * i, h * f + num_ranks * i + w
        # Forwards beyond those that fit before `first` gain nothing.
        most = min(num_micro, floor((first - start) / f) + 1 if f else num_micro, num_micro if cap is None else cap)
        least = min(_work(a, num_micro, (f, i + w, fb), (start, first, rest)) for a in range(1, most + 1))
        bound = max(bound, least, start + num_micro * min(fb, f + i + w))
    return bound


def plan_bound(plan: Plan, costs: CostModel, cap: int | None = None) -> float:
    """`lower_bound` for any plan with the placement of `plan`; `costs` are those of its stages.

    A `vee` of PP ranks is one half of a bidirectional pipeline of 2 PP ranks with twice the micro-batches.
    """
    return lower_bound(plan.placement.num_stages, plan.num_micro * plan.placement.parts, costs, cap)


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
