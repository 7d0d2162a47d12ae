import random

import pytest

from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.bound import lower_bound, plan_bound
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate


@pytest.mark.parametrize(
    ("num_micro", "fb", "bound"),
    [
        (2, 2.25, 17),
        (4, 2.25, 19),
        (8, 2.25, 27),
        (15, 2.25, 42.75),
        (15, 3, 48),
        (16, 2.25, 45),
        (16, 3, 51),
        (32, 2.25, 81),
        (32, 3, 99),
        (64, 3, 195),
    ],
)
def test_bound_on_8_ranks(num_micro: int, fb: float, bound: float) -> None:
    assert lower_bound(8, num_micro, CostModel(fb=fb)) == bound


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("draws", [12, pytest.param(60, marks=pytest.mark.all)])
def test_no_plan_beats_the_bound(schedule: str, draws: int) -> None:
    rng = random.Random(schedule)
    for _ in range(draws):
        num_ranks, num_micro = rng.choice((2, 4, 6)), rng.randint(1, 20)
        reference = make_plan(schedule, num_ranks, num_micro)
        stages = range(reference.placement.num_stages)
        f, i, w = (
            tuple(rng.uniform(0.3, 2) for _ in stages) if rng.random() < 0.5 else rng.uniform(0.3, 2) for _ in "fiw"
        )
        costs = CostModel(f, i, w)
        if rng.random() < 0.5:
            costs = CostModel(1, 0.8, 1.1, rng.uniform(1.9, 2.9), comm=rng.choice((0, 0.2)))
        for optimize in (False, True):
            plan = make_plan(schedule, num_ranks, num_micro, costs, optimize)
            assert plan_bound(plan, costs) <= simulate(plan, costs).makespan * (1 + 1e-9)


def test_search_over_pairs_is_complete() -> None:
    """The formula of the docstring, over every a and x."""
    for num_ranks, num_micro, fb in [(2, 7, 2.2), (4, 5, 2.6), (8, 20, 2.25), (6, 18, 2.9)]:
        f, i, w = 1.0, 0.8, 1.1
        b = i + w
        worst = num_ranks * (f + i) + w
        for h in range(num_ranks // 2):
            start, first, rest = h * f, num_ranks * f + h * i, h * f + num_ranks * i + w
            least = max(first, start + num_micro * f) + num_micro * b
            least = max(least, start + num_micro * f + rest)
            for a in range(1, num_micro):
                begin = max(first, start + a * f)
                for x in range(num_micro - a + 1):
                    left = max(rest, (num_micro - x) * b)
                    least = min(least, begin + x * fb + (num_micro - a - x) * f + left)
            worst = max(worst, least, start + num_micro * min(fb, f + b))
        assert lower_bound(num_ranks, num_micro, CostModel(f, i, w, fb)) == pytest.approx(worst)


def test_cap_raises_the_bound() -> None:
    costs = CostModel(fb=2.25)
    bounds = [lower_bound(8, 32, costs, cap) for cap in (1, 4, 9, None)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]
