import random

import pytest
from plan_checks import check_plan

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.orders.registry import KNOWN
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.search import under_cap
from dualpipe_engine.schedule.search.compare import best, best_of, compare
from dualpipe_engine.schedule.search.job_costs import Measurement
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate

UNIT = CostModel(0.5, 0.5, 0.5)  #: of half a stage


def case(seed: int) -> tuple[int, int, CostModel, int]:
    """Ranks, micro-batches, costs of the halves of stages, and a cap from V-Min's to one below ZB-V's."""
    draw = random.Random(seed)
    ranks = draw.randint(2, 16)
    micros = draw.randint(1, 64)
    costs = CostModel(*(draw.uniform(0.3, 2) for _ in range(3)), comm=draw.choice([0.0, 0.0, 0.1, 0.3]))
    if draw.random() < 0.3:  # a head that takes longer
        costs = CostModel(*((each,) * (2 * ranks - 1) + (1.5 * each,) for each in (costs.f, costs.i, costs.w)))
    most = 2 * ranks - 1
    return ranks, micros, costs, draw.randint(min(KNOWN["vmin"].default_cap(ranks), most), most)


def check(seed: int) -> None:
    ranks, micros, costs, cap = case(seed)
    larger = min(cap + random.Random(seed).randint(1, 4), 2 * ranks)
    plans = [make_plan("zbv", ranks, micros, costs, optimize=True, activation_cap=each) for each in (cap, larger)]
    verify(lower(plans[0]), activation_cap=cap)
    assert max(peak_activations(plans[1])) <= larger
    makespans = [simulate(plan, costs).makespan for plan in plans]
    assert makespans[1] <= makespans[0] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(25))
def test_every_cap_has_a_plan_and_a_larger_one_is_no_slower(seed: int) -> None:
    check(seed)


@pytest.mark.all
@pytest.mark.parametrize("start", range(25, 500, 25))
def test_500_caps(start: int) -> None:
    for seed in range(start, start + 25):
        check(seed)


def test_a_dial_from_one_micro_batch_at_a_time_to_zbv() -> None:
    """8 ranks, 24 micro-batches; each cap is used, and each activation more helps, or costs nothing."""
    found = {cap: make_plan("zbv", 8, 24, UNIT, True, cap) for cap in (2, 3, 5, 6, 8, 10, 12, 14, 16)}
    makespans = [simulate(plan, UNIT).makespan for plan in found.values()]
    assert makespans == sorted(makespans, reverse=True) and len(set(makespans)) == len(makespans)
    assert all(max(peak_activations(plan)) <= cap for cap, plan in found.items())
    assert makespans[-1] == simulate(make_plan("zbv", 8, 24), UNIT).makespan


@pytest.mark.parametrize("schedule", ["zbv", "vhalf", "vmin"])
@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_each_takes_any_cap_from_2(schedule: str, optimize: bool, split: bool) -> None:
    own = KNOWN[schedule].default_cap(4)
    for cap in range(2, own + 3):
        plan = make_plan(schedule, 4, 9, UNIT, optimize, cap, split)
        check_plan(plan)
        assert plan.schedule == schedule
        assert max(peak_activations(plan)) <= (cap if schedule == "zbv" else min(cap, own))
        assert {op.kind for program in plan.programs for op in program}.isdisjoint("" if split else "IW")
    with pytest.raises(PlanError, match=r"activation_cap = 1 .*the smallest cap that works is 2"):
        make_plan(schedule, 4, 9, UNIT, optimize, 1, split)


def test_without_a_cap_each_keeps_its_own() -> None:
    for schedule in ("vhalf", "vmin"):
        plan = make_plan(schedule, 8, 16, CostModel(0.5, 0.7, 0.4, comm=0.05), optimize=True)
        assert max(peak_activations(plan)) <= KNOWN[schedule].default_cap(8)


def test_a_large_batch_is_chosen_for_on_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_cap, "MOST_OPS", 20_000)
    plan = under_cap.under_cap(4, 200, UNIT, 5)
    check_plan(plan)
    assert plan.num_micro == 200 and max(peak_activations(plan)) <= 5
    few = simulate(under_cap.under_cap(4, 20, UNIT, 5), UNIT).makespan
    assert simulate(plan, UNIT).makespan < few + 180 * 3.3


def test_a_comparison_takes_a_schedule_under_a_cap() -> None:
    rows = {row.schedule: row for row in compare(4, 8, activation_cap=2.5)}
    assert [name for name, row in rows.items() if row.feasible] == ["zbv", "vhalf", "vmin"]
    assert all(row.peak_activations <= 2.5 for row in rows.values() if row.feasible)
    assert best_of(list(rows.values())).schedule == "zbv"


def test_auto_takes_a_schedule_that_fits_into_the_memory() -> None:
    costs = CostModel(activation_bytes=10)
    state = {"linear": 100, "bidirectional": 200, "vee": 100, "loop of 2": 100}
    job = Measurement(costs, 4, 64, state_bytes=state, memory_bytes=120)
    found = best(4, 8, costs, job=job)
    assert found.cap == 4 and found.memory <= 120 and max(peak_activations(found.plan)) <= 4
