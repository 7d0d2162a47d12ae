"""A lower bound of the makespan of any plan for a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from math import floor

from ..op import B, F, Op, pair
from ..plan import Plan
from .costs import CostModel


def lower_bound(num_ranks: int, num_micro: int, costs: CostModel, cap: int | None = None) -> float:
    """Seconds that no `linear` or `bidirectional` plan beats whose pairs are of a forward and a full backward.

    A rank cannot start before a micro-batch has come to its stage (`start`), nor run a backward before one has come
    back to it (`first`), and once it has run its last forward the batch needs as long as that one needs to the last
    stage and back to the first (`rest`). Say it runs a forwards before its first backward and x of the others in pairs;
    the least over a and x of the time that its work then takes is a bound. Of a rank's stages the least counts.

    Args:
        num_ranks: pipeline ranks PP.
        num_micro: micro-batches of the batch.
        costs: costs of the PP stages.
        cap: activations that a rank may hold; None: any number.

    Raises:
        PlanError: the costs are for another number of stages.
    """
    halves = [(h, num_ranks - 1 - h) for h in range((num_ranks + 1) // 2)]
    return _bound(halves, [costs.comm] * (num_ranks - 1), num_micro, costs, cap)


def plan_bound(plan: Plan, costs: CostModel, cap: int | None = None) -> float:
    """`lower_bound` for any plan with the placement of `plan`; `costs` are those of its stages.

    A rank of `parts` stages has as many times the work.
    """
    placement = plan.placement
    ranks = [placement.rank(stage) for stage in range(placement.num_stages)]
    hops = [costs.comm if here != there else 0.0 for here, there in pairwise(ranks)]
    stages = [placement.stages_of(rank) for rank in range(placement.num_ranks)]
    return _bound(stages, hops, plan.num_micro * placement.parts, costs, cap)


def _bound(
    ranks: Iterable[Sequence[int]], hops: Sequence[float], num_micro: int, costs: CostModel, cap: int | None
) -> float:
    """The bound of ranks with these stages, each with `num_micro` forwards and backwards."""
    num_stages = len(hops) + 1
    costs.check(num_stages)
    each = [costs.at(stage) for stage in range(num_stages)]
    # When one micro-batch alone comes to a stage, and how much longer it takes from there back to the first.
    there = list(accumulate((f + hop for (f, _, _, _), hop in zip(each, hops, strict=False)), initial=0.0))
    back = list(accumulate((i + hop for (_, i, _, _), hop in zip(each, hops, strict=False)), initial=0.0))
    turn = there[-1] + each[-1][0]
    bound = turn + back[-1] + each[-1][1] + each[0][2]
    seen = set()
    for stages in ranks:
        f, i, w = (min(each[stage][part] for stage in stages) for part in range(3))
        kinds = {each[stage]: stage for stage in stages}.values()
        fb = min(costs.duration(pair(Op(F, one, 0), Op(B, other, 1))) for one in kinds for other in kinds)
        start = min(there[stage] for stage in stages)
        first = turn + min(back[-1] + each[-1][1] - back[stage] - each[stage][1] for stage in stages)
        rest = turn + back[-1] + each[-1][1] + each[0][2] - max(there[stage] + each[stage][0] for stage in stages)
        times = start, first, rest
        if (times, f, i + w, fb) in seen:
            continue
        seen.add((times, f, i + w, fb))
        # Forwards beyond those that fit before `first` gain nothing.
        most = min(num_micro, floor((first - start) / f) + 1 if f else num_micro, num_micro if cap is None else cap)
        least = min(_work(a, num_micro, (f, i + w, fb), times) for a in range(1, most + 1))
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
