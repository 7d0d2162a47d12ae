"""Cuts of a model's layers into stages that give every rank the same work.

A rank of a mirrored placement holds stages s and n-1-s of n, and their sum bounds its time: a heavy head may share a
rank with few layers of the other end. Such a cut is found from both ends at once, pair by pair, inwards.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from math import inf, isfinite

from ...errors import PlanError
from ..placement import Placement
from .spread import spread

_UNITS = 1 << 20  # weights are rounded to this part of their sum: sums of integers compare exactly


def equal_counts(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Stage bounds with the same number of layers in each stage, the first ones with one more where it does not divide.

    Raises:
        PlanError: there are fewer layers than stages.
    """
    _check_count(num_layers, num_stages)
    count, more = divmod(num_layers, num_stages)
    return tuple(stage * count + min(stage, more) for stage in range(num_stages + 1))


def balance_pairs(weights: Sequence[float], placement: Placement) -> tuple[int, ...]:
    """Cut layers into stages so that the rank with the most work has as little as any cut allows.

    Args:
        weights: time of each layer, in any unit; only their ratios matter.
        placement: which stages share a rank.

    Returns:
        Bounds b of length num_stages + 1: stage s has layers b[s] to b[s+1] - 1, at least one.

    Raises:
        PlanError: there are fewer layers than stages, or a weight is negative or not finite.
    """
    return balanced_cuts(weights, placement, (0.0,))[0]


def balanced_cuts(weights: Sequence[float], placement: Placement, slacks: Sequence[float]) -> list[tuple[int, ...]]:
    """For each slack an even cut whose largest rank load is at most 1 + slack times the least that any cut has.

    The load of a rank is the sum over the stages that it holds. Exact for weights rounded to a millionth of their sum.
    Even means: for `linear` the sum of the squares of stage loads is the least; for the mirrored placements no border,
    and no border together with its mirrored one, can move by a layer and lower the sum of the squares of all stage and
    rank loads. For any other placement see `spread`, which need not find the least.

    Args, Returns (each), Raises: see `balance_pairs`.
    """
    _check_count(len(weights), placement.num_stages)
    if not all(isfinite(weight) and weight >= 0 for weight in weights):
        raise PlanError(f"times of layers must be finite and not negative, got {list(weights)}")
    total = sum(weights)
    units = [round(weight / total * _UNITS) for weight in weights] if total else [1] * len(weights)
    stages = placement.num_stages
    held = [placement.stages_of(rank) for rank in range(placement.num_ranks)]
    if all(len(each) == 1 for each in held):
        return [tuple(cut) for cut in _cut_stages(units, stages, slacks)]
    if all(len(each) == 2 and sum(each) == stages - 1 for each in held):
        return [tuple(_even(cut, units)) for cut in _cut_pairs(units, stages // 2, slacks)]
    (even,) = _cut_stages(units, stages, (0.0,))
    return [tuple(cut) for cut in spread(even, units, placement, slacks)]


def stage_loads(weights: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """Sum of `weights` in each stage."""
    return [sum(weights[start:stop]) for start, stop in pairwise(bounds)]


def rank_loads(weights: Sequence[float], bounds: Sequence[int], placement: Placement) -> list[float]:
    """Sum of `weights` over the stages that each rank holds."""
    stages = stage_loads(weights, bounds)
    return [sum(stages[stage] for stage in placement.stages_of(rank)) for rank in range(placement.num_ranks)]


def _check_count(num_layers: int, num_stages: int) -> None:
    if num_layers < num_stages:
        raise PlanError(f"{num_layers} layers cannot fill {num_stages} stages: use fewer ranks or cut finer layers")


def _least(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The smallest number from low to high that fits; `high` does, and so does every number above one that fits."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


# -- one stage a rank ------------------------------------------------------------------------------------------------


def _cut_stages(units: list[int], stages: int, slacks: Sequence[float]) -> list[list[int]]:
    """Bounds whose largest stage is within each slack of the least."""
    sums = [0, *accumulate(units)]

    def fits(limit: int) -> bool:
        stop = 0
        for _ in range(stages):
            stop = bisect_right(sums, sums[stop] + limit) - 1
        return stop == len(units)

    least = _least(max(units), sums[-1], fits)
    return [_least_squares(sums, stages, round(least * (1 + slack))) for slack in slacks]


def _least_squares(sums: list[int], stages: int, limit: int) -> list[int]:
    """Bounds with the least sum of squares of stages of at most `limit`."""
    layers = len(sums) - 1
    squares: list[float] = [0.0] + [inf] * layers  # least sum for the first i layers in the stages so far
    origins = []
    for _ in range(stages):
        found, origin = [inf] * (layers + 1), [0] * (layers + 1)
        for stop in range(1, layers + 1):
            for start in range(stop - 1, -1, -1):
                load = sums[stop] - sums[start]
                if load > limit:
                    break
                if squares[start] + load * load < found[stop]:
                    found[stop], origin[stop] = squares[start] + load * load, start
        squares = found
        origins.append(origin)
    bounds = [layers]
    for origin in reversed(origins):
        bounds.append(origin[bounds[-1]])
    return bounds[::-1]


# -- two mirrored stages a rank --------------------------------------------------------------------------------------


def _cut_pairs(units: list[int], pairs: int, slacks: Sequence[float]) -> list[list[int]]:
    """Bounds of 2 * pairs stages whose largest sum of two mirrored stages is within each slack of the least."""
    left, right = [0, *accumulate(units)], [0, *accumulate(reversed(units))]
    total = left[-1]
    floor = max(-(-total // pairs), max(units), units[0] + units[-1])
    # Cuts that may leave stages empty are searched fast, and real cuts mostly reach their limit.
    limit = _least(floor, total, lambda limit: _may_fit(left, right, pairs, limit))
    step, failed = 1, limit - 1
    while not (bounds := _fit(left, right, pairs, limit)):
        failed, limit, step = limit, limit + step, 4 * step
    while failed + 1 < (limit := _largest_pair(left, bounds)):
        middle = (failed + limit) // 2
        if better := _fit(left, right, pairs, middle):
            bounds = better
        else:
            failed = middle
    return [_fit(left, right, pairs, round(limit * (1 + slack))) if slack else bounds for slack in slacks]


def _largest_pair(sums: list[int], bounds: list[int]) -> int:
    loads = [sums[stop] - sums[start] for start, stop in pairwise(bounds)]
    return max(map(sum, zip(loads, reversed(loads), strict=True)))


def _may_fit(left: list[int], right: list[int], pairs: int, limit: int) -> bool:
    """Whether `pairs` pairs of stages, perhaps empty ones, of at most `limit` hold all layers.

    Weights come as sums of the first layers from either end. Pair by pair `reach[i]` is the most layers of the right
    end that can be taken together with i of the left end; fewer are then possible too.
    """
    layers = len(left) - 1
    reach = [0]
    for _ in range(pairs):
        window: deque[tuple[int, int]] = deque()  # (i, sum) of states before this pair, sums falling
        grown: list[int] = []
        for i, taken in enumerate(left):
            if i < len(reach):
                both = taken + right[reach[i]]
                while window and window[-1][1] <= both:
                    window.pop()
                window.append((i, both))
            while window and taken - left[window[0][0]] > limit:
                window.popleft()
            if not window:
                break
            grown.append(bisect_right(right, window[0][1] + limit - taken) - 1)
            if i + grown[-1] >= layers:
                return True
        reach = grown
    return False


def _fit(left: list[int], right: list[int], pairs: int, limit: int) -> list[int]:
    """Bounds of 2 * pairs stages, each with a layer and each pair at most `limit`; empty where there are none.

    After k pairs a state (a, b) has taken k + a layers from the left end and k + b from the right one. It is reached
    from a state of k - 1 pairs with no larger a and b whose sum is at least its own less `limit`: the largest of those
    sums, most[k - 1][a][b] (-1: none), decides.
    """
    layers, total = len(left) - 1, left[-1]
    spare = layers - 2 * pairs
    most = [[[0] * (spare + 1 - a) for a in range(spare + 1)]]
    for k in range(1, pairs):
        needed = total - (pairs - k) * limit
        table: list[list[int]] = []
        above = [-1] * (spare + 1)
        for before, taken in zip(most[-1], left[k:], strict=False):
            # Only sums from `needed` to k * limit matter; rows of `most` never fall.
            low = max(0, bisect_left(right, needed - taken) - k)
            high = max(0, bisect_right(right, k * limit - taken) - k)
            row = above[: min(low, len(before))]
            best = row[-1] if row else -1
            for source, other, up in zip(before[low:high], right[k + low :], above[low:], strict=False):
                both = taken + other
                if best < both and 0 <= source >= both - limit:
                    best = both
                if best < up:
                    best = up
                row.append(best)
            row += [max(best, up) for up in above[len(row) : len(before)]]
            table.append(row)
            above = row
        if all(row[-1] < 0 for row in table):
            return []
        most.append(table)
    ends = [pairs + a for a in range(spare + 1) if most[-1][a][spare - a] >= max(0, total - limit)]
    if not ends:
        return []
    middle = min(ends, key=lambda i: abs(2 * left[i] - total))
    way = _way(left, right, most, limit, (middle, layers - middle))
    return [0, *(i for i, _ in way), *(layers - j for _, j in reversed(way[:-1])), layers]


def _way(
    left: list[int], right: list[int], most: list[list[list[int]]], limit: int, end: tuple[int, int]
) -> list[tuple[int, int]]:
    """Layers taken from both ends after each pair up to `end`, traced back with pairs as even as `most` allows."""
    way = [end]
    for k in range(len(most) - 1, 0, -1):
        i, j = way[-1]
        goal = (left[i] + right[j]) / (2 * k + 2)
        best, origin = inf, end
        for a in range(i - 1, k - 1, -1):
            one = left[i] - left[a]
            if one > limit:
                break
            for b in range(j - 1, k - 1, -1):
                other = right[j] - right[b]
                if one + other > limit:
                    break
                uneven = (one - goal) ** 2 + (other - goal) ** 2
                if uneven < best and most[k - 1][a - k][b - k] >= max(0, left[a] + right[b] - limit):
                    best, origin = uneven, (a, b)
        way.append(origin)
    return way[::-1]


def _even(bounds: list[int], units: list[int]) -> list[int]:
    """Move borders, alone or with their mirrored one, by a layer while the squares of stage and rank loads fall."""
    sums, stages = [0, *accumulate(units)], len(bounds) - 1
    limit = _largest_pair(sums, bounds)

    def squares(border: int) -> float:
        """Sum over the two pairs of stages that the border touches; infinite for a cut that is not allowed."""
        total = 0.0
        for stage in (border - 1, border):
            mirror = stages - 1 - stage
            one, other = (sums[bounds[s + 1]] - sums[bounds[s]] for s in (stage, mirror))
            if one + other > limit or bounds[stage] >= bounds[stage + 1] or bounds[mirror] >= bounds[mirror + 1]:
                return inf
            total += one**2 + other**2 + (one + other) ** 2
        return total

    moves = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]
    moved = True
    while moved:
        moved = False
        for border in range(1, stages // 2 + 1):
            mirror = stages - border
            for one, other in moves if border != mirror else moves[:2]:
                before = squares(border)
                bounds[border] += one
                bounds[mirror] += other
                if squares(border) < before:
                    moved = True
                else:
                    bounds[border] -= one
                    bounds[mirror] -= other
    return bounds
