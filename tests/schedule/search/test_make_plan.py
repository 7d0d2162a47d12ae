import random
import time

import pytest
from plan_checks import check_plan

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import atoms
from dualpipe_engine.schedule.orders import dualpipe
from dualpipe_engine.schedule.orders.registry import KNOWN, SCHEDULES
from dualpipe_engine.schedule.passes.rewrite import join
from dualpipe_engine.schedule.placement import Placement
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.compare import best, compare
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.bound import plan_bound
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import makespan_of, peak_activations, simulate

# micro-batches, F&B, then the makespans of: 1F1B, ZB1P, DualPipe's reference order, DualPipe's best candidate. PP = 8.
MAKESPANS = [
    (2, 2.25, 27, 19, 21, 17),
    (4, 2.25, 33, 23, 25, 19),
    (8, 2.25, 45, 31, 33, 27),
    (15, 2.25, 66, 52, 46.5, 44.25),
    (16, 2.25, 69, 55, 46.5, 45.75),
    (32, 2.25, 117, 103, 82.5, 81.75),
    (64, 2.25, 213, 199, 154.5, 153.75),
    (2, 3, 27, 19, 21, 17),
    (4, 3, 33, 23, 25, 19),
    (8, 3, 45, 31, 33, 27),
    (15, 3, 66, 52, 54, 48),
    (16, 3, 69, 55, 54, 51),
    (32, 3, 117, 103, 102, 99),
    (64, 3, 213, 199, 198, 195),
]


@pytest.mark.parametrize(("num_micro", "fb", "one_f_one_b", "zb1p", "template", "best_candidate"), MAKESPANS)
def test_makespans_on_8_ranks(
    num_micro: int, fb: float, one_f_one_b: float, zb1p: float, template: float, best_candidate: float
) -> None:
    costs = CostModel(fb=fb)
    for schedule, expected in (("1f1b", one_f_one_b), ("zb1p", zb1p), ("dualpipe", template)):
        assert simulate(make_plan(schedule, 8, num_micro, costs), costs).makespan == expected
    plan = make_plan("dualpipe", 8, num_micro, costs, optimize=True)
    assert simulate(plan, costs).makespan == best_candidate
    assert max(peak_activations(plan)) <= 9


@pytest.mark.parametrize(
    ("i", "w", "fb", "comm", "reference", "best_candidate"),
    [
        (1.3, 0.7, 2.25, 0.0, 84.3, 83.0),
        (1.3, 0.7, 2.25, 0.1, 88.2, 85.9),
        (1.3, 0.7, 2.5, 0.1, 94.7, 91.6),
        (1.0, 1.0, 2.5, 0.1, 92.7, 91.4),
        (1.0, 1.0, 2.75, 0.0, 95.5, 93.75),
    ],
)
def test_fewer_pairs_in_the_cool_down(
    i: float, w: float, fb: float, comm: float, reference: float, best_candidate: float
) -> None:
    costs = CostModel(i=i, w=w, fb=fb, comm=comm)
    made = [make_plan("dualpipe", 8, 32, costs, optimize=optimize) for optimize in (False, True)]
    assert [simulate(plan, costs).makespan for plan in made] == pytest.approx([reference, best_candidate])
    assert max(peak_activations(made[1])) <= 9


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("split_backward", [True, False])
@pytest.mark.parametrize("draws", [10, pytest.param(60, marks=pytest.mark.all)])
def test_optimized_plans(schedule: str, split_backward: bool, draws: int) -> None:
    rng = random.Random(schedule)
    for _ in range(draws):
        num_ranks, num_micro = rng.choice((2, 4, 6)), rng.randint(1, 18)
        placement = make_plan(schedule, num_ranks, num_micro).placement
        f, i, w = (tuple(rng.uniform(0.5, 1.5) for _ in range(placement.num_stages)) for _ in "fiw")
        costs = rng.choice((CostModel(f, i, w), CostModel(fb=2.25), CostModel(w=0.6, comm=0.2)))
        arguments = schedule, num_ranks, num_micro, costs
        reference = make_plan(*arguments, split_backward=split_backward)
        plan = make_plan(*arguments, optimize=True, split_backward=split_backward)
        check_plan(plan)
        assert (plan.placement, plan.schedule) == (placement, schedule)
        assert simulate(plan, costs).makespan <= simulate(reference, costs).makespan * (1 + 1e-9)
        assert max(peak_activations(plan)) <= KNOWN[schedule].default_cap(num_ranks)
        if not split_backward:
            check_plan(reference)
            for chosen in (plan, reference):
                assert all(op.kind not in "IW" for program in chosen.programs for full in program for op in atoms(full))


def test_reference_order_is_kept_without_optimize_and_where_it_is_best() -> None:
    reference = dualpipe.generate(8, 32)
    assert make_plan("dualpipe", 8, 32) == reference
    assert make_plan("dualpipe", 8, 32, CostModel(fb=2.25), optimize=True, split_backward=False) == join(reference)


def test_1f1b_stays_1f1b() -> None:
    assert make_plan("1f1b", 5, 9, CostModel(comm=1), optimize=True) == make_plan("1f1b", 5, 9)


@pytest.mark.parametrize(
    ("name", "guess"), [("dualpip", "dualpipe"), ("1f1B", "1f1b"), ("ZBV", "zbv"), ("zb2p", "zb1p"), ("", "")]
)
def test_unknown_schedule(name: str, guess: str) -> None:
    with pytest.raises(
        PlanError, match=f"unknown schedule '{name}': did you mean '{guess}.*1f1b, zb1p, dualpipe, dual"
    ):
        make_plan(name, 4, 8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("split_backward", [True, False])
def test_impossible_cap_names_the_smallest_that_works(schedule: str, optimize: bool, split_backward: bool) -> None:
    for num_ranks, num_micro in [(2, 1), (4, 3), (4, 12)]:

        def make(cap: int) -> list[int]:
            return peak_activations(
                make_plan(schedule, num_ranks, num_micro, CostModel(), optimize, cap, split_backward)  # noqa: B023
            )

        with pytest.raises(PlanError, match=r"activation_cap = 0 .*the smallest cap that works is \d+") as error:
            make(0)
        smallest = int(str(error.value).split()[-1])
        assert max(make(smallest)) <= smallest
        with pytest.raises(PlanError, match=f"the smallest cap that works is {smallest}$"):
            make(smallest - 1)


def test_more_memory_never_slows_down() -> None:
    costs = CostModel(1, 0.9, 1.1, comm=0.1)
    times = [simulate(make_plan("dualpipe", 8, 16, costs, True, cap), costs).makespan for cap in (9, 10, 12, 20)]
    assert times == sorted(times, reverse=True)


def test_a_cap_above_its_own_is_no_slower_than_none() -> None:
    costs = CostModel(0.5, 0.5, 0.5, comm=0.1)
    for schedule, own in (("zbv", 8), ("dualpipev", 9)):
        free = simulate(make_plan(schedule, 4, 8, costs, True), costs).makespan
        for cap in (own, own + 1):
            plan = make_plan(schedule, 4, 8, costs, True, cap)
            assert simulate(plan, costs).makespan <= free
            assert max(peak_activations(plan)) <= cap


# i, w, F&B, hop -> the makespan of an optimum of 4 ranks and 8 micro-batches (f = 1, at most 5 activations) that CP-SAT
# has proven, among plans whose directions mirror each other and take micro-batches in order.
OPTIMA = [
    (1.0, 1.0, 2.25, 0.1, 22.95),
    (1.2, 0.8, 2.55, 0.1, 24.4),
    (1.4, 0.6, 3.0, 0.1, 25.2),
    (1.4, 0.6, 2.1, 0.1, 23.1),
    (1.2, 0.8, 2.55, 0.2, 24.7),
    (1.4, 0.6, 2.1, 0.2, 24.0),
    (1.0, 1.0, 2.25, 0.3, 24.25),
    (1.2, 0.8, 2.55, 0.3, 25.0),
    (0.8, 1.2, 2.85, 0.3, 25.45),
    (1.4, 0.6, 3.0, 0.3, 25.6),
    (1.4, 0.6, 2.1, 0.3, 24.4),
]


@pytest.mark.parametrize(("i", "w", "fb", "comm", "optimum"), OPTIMA)
def test_within_2_percent_of_the_optimum_with_transfers(
    i: float, w: float, fb: float, comm: float, optimum: float
) -> None:
    costs = CostModel(i=i, w=w, fb=fb, comm=comm)
    plan = make_plan("dualpipe", 4, 8, costs, optimize=True)
    check_plan(plan)
    assert max(peak_activations(plan)) <= 5
    assert plan_bound(plan, costs, 5) <= optimum * (1 + 1e-9)
    assert simulate(plan, costs).makespan <= 1.02 * optimum


@pytest.mark.parametrize("num_ranks", [4, 8, pytest.param(16, marks=pytest.mark.all)])
@pytest.mark.parametrize(("i", "w", "fb", "comm"), [(1.4, 0.6, 2.1, 0.3), (1.0, 1.0, 2.55, 0.2)])
def test_steady_state_is_that_of_alternating_pairs(num_ranks: int, i: float, w: float, fb: float, comm: float) -> None:
    """No steady state with as many activations is shorter: tests/test_optima.py."""
    costs = CostModel(i=i, w=w, fb=fb, comm=comm)
    times = [makespan_of(make_plan("dualpipe", num_ranks, n * num_ranks, costs, True), costs) for n in (4, 8)]
    assert times[1] - times[0] <= 1.01 * 4 * num_ranks * (fb + (num_ranks - 1) * comm / num_ranks)


def test_odd_ranks() -> None:
    with pytest.raises(PlanError, match=r'even number of pipeline ranks, got 5: .*"schedule": "dualpipev"'):
        make_plan("dualpipe", 5, 10)
    row = {row.schedule: row for row in compare(5, 10)}["dualpipe"]
    assert (row.feasible, row.plan, row.makespan) == (False, None, float("inf"))
    assert "even number" in row.reason
    assert best(5, 10).schedule != "dualpipe"


def test_costs_for_other_stages() -> None:
    with pytest.raises(PlanError, match="4 numbers, but there are 8 stages"):
        make_plan("zbv", 4, 8, CostModel(f=(1.0,) * 4))
    with pytest.raises(PlanError, match="8 numbers, but there are 4 stages"):
        compare(4, 8, CostModel(f=(1.0,) * 8))


# 8 ranks: micro-batches, F&B -> memory in full-stage activations and makespan of each schedule's best candidate.
EQUAL_WORK = {
    (8, 3): {"1f1b": (8, 45), "zb1p": (8, 31), "dualpipe": (8, 27), "dualpipev": (8, 27.5), "zbv": (8, 27.5)},
    (16, 3): {"1f1b": (8, 69), "zb1p": (8, 55), "dualpipe": (9, 51), "dualpipev": (8.5, 51.5), "zbv": (8, 51.5)},
    (32, 3): {"1f1b": (8, 117), "zb1p": (8, 103), "dualpipe": (9, 99), "dualpipev": (8.5, 99.5), "zbv": (8, 99.5)},
    (64, 3): {"1f1b": (8, 213), "zb1p": (8, 199), "dualpipe": (9, 195), "dualpipev": (8.5, 195.5), "zbv": (8, 195.5)},
    (16, 2.25): {"zb1p": (8, 55), "dualpipe": (9, 45.75), "dualpipev": (8.5, 46.375), "zbv": (8, 51.5)},
    (32, 2.25): {"zb1p": (8, 103), "dualpipe": (9, 81.75), "dualpipev": (8.5, 82.375), "zbv": (8, 99.5)},
    (64, 2.25): {"zb1p": (8, 199), "dualpipe": (9, 153.75), "dualpipev": (8.5, 154.375), "zbv": (8, 195.5)},
}


@pytest.mark.parametrize(
    ("num_micro", "fb"), [pytest.param(*key, marks=[pytest.mark.all] * (key[0] > 16)) for key in EQUAL_WORK]
)
def test_comparison_on_equal_work(num_micro: int, fb: float) -> None:
    rows = {row.schedule: row for row in compare(8, num_micro, CostModel(fb=fb))}
    assert tuple(rows) == SCHEDULES
    for schedule, (peak, makespan) in EQUAL_WORK[num_micro, fb].items():
        row = rows[schedule]
        assert (row.feasible, row.makespan) == (True, makespan)
        assert row.peak_activations <= peak
        assert row.bubble == pytest.approx(makespan - min(simulated_busy(row.plan, CostModel(fb=fb))))
        assert row.parameter_copies == (2 if schedule == "dualpipe" else 1)


def simulated_busy(plan: Plan | None, costs: CostModel) -> list[float]:
    assert plan is not None
    return simulate(plan, costs.for_placement(plan.placement)).busy()


# ranks, micro-batches, f, i, w, F&B, hop, cap -> the fastest
SETTINGS = [
    ((8, 16, 1, 1, 1, 2.25, 0.0, None), "dualpipe"),
    ((8, 32, 1, 1, 1, 2.25, 0.0, None), "dualpipe"),
    ((8, 32, 1, 1, 1, 2.25, 0.1, None), "dualpipe"),
    ((8, 15, 1, 1, 1, 2.25, 0.0, None), "dualpipev"),
    ((8, 16, 1, 1, 1, 2.25, 0.0, 8.5), "dualpipev"),
    ((8, 16, 1, 1, 1, 3.0, 0.0, None), "dualpipe"),
    ((8, 16, 1, 1, 1, 3.0, 0.0, 8.5), "zbv"),
    ((8, 16, 1, 1, 1, 3.0, 0.0, 8), "zbv"),
    ((7, 21, 1, 1, 1, 2.25, 0.0, None), "dualpipev"),
    ((7, 21, 1, 1, 1, 3.0, 0.0, None), "zbv"),
    ((1, 4, 1, 1, 1, 3.0, 0.0, None), "1f1b"),
    ((4, 1, 1, 1, 1, 3.0, 0.0, None), "dualpipev"),
    ((2, 16, 1, 1, 1, 2.25, 0.0, None), None),
    ((4, 16, 1, 1.3, 0.7, 2.5, 0.2, None), None),
    ((4, 64, 1, 0.8, 1.2, 2.9, 1.0, None), None),
    ((3, 12, 1, 1, 1, 3.0, 2.0, None), None),
]


MANY = (2, 3, 5, 7, 8, 9, 14)  #: of SETTINGS: with as many ops, or like another one


@pytest.mark.parametrize(
    ("setting", "expected"),
    [pytest.param(*row, marks=[pytest.mark.all] * (number in MANY)) for number, row in enumerate(SETTINGS)],
)
def test_best_is_the_simulated_best(setting: tuple, expected: str | None) -> None:
    num_ranks, num_micro, f, i, w, fb, comm, cap = setting
    costs = CostModel(f, i, w, fb, comm)
    chosen = best(num_ranks, num_micro, costs, cap)
    makespans = {}
    for schedule in SCHEDULES:
        parts = KNOWN[schedule].parts
        try:
            placed = costs.for_placement(Placement("vee" if parts == 2 else "linear", num_ranks))
            limit = None if cap is None else int(cap * parts)
            plan = make_plan(schedule, num_ranks, num_micro, placed, True, limit)
        except PlanError:
            continue
        makespans[schedule] = simulate(plan, placed).makespan
    assert chosen.makespan == min(makespans.values()) == makespans[chosen.schedule]
    assert expected is None or chosen.schedule == expected
    assert chosen.reason.startswith(f"{chosen.schedule} has the shortest simulated step")
    assert all(schedule in chosen.reason for schedule in makespans)


def test_nothing_feasible() -> None:
    with pytest.raises(PlanError, match=r"no schedule is feasible: 1f1b .*; zbv .*"):
        best(4, 8, activation_cap=0.5)


def test_optimize_takes_time_in_proportion_to_the_ops() -> None:
    least = {}
    for micros in (32, 128):
        seconds = []
        for _ in range(2):
            begin = time.process_time()
            plan = make_plan("dualpipe", 8, micros, optimize=True)
            seconds.append(time.process_time() - begin)
        least[micros] = min(seconds)
        assert simulate(plan, CostModel()).makespan < simulate(dualpipe.generate(8, micros), CostModel()).makespan
    assert least[128] < 2.5 * 4 * least[32]


LARGER = [  # ranks, micro-batches, i, w, F&B, hop -> the makespan of the best plan that CP-SAT finds
    (8, 12, 1.4, 0.6, 2.1, 0.3, 41.8),
    (8, 16, 1.4, 0.6, 2.1, 0.3, 51.3),
    (8, 16, 1.0, 1.0, 2.55, 0.2, 50.95),
    (16, 16, 1.4, 0.6, 2.1, 0.3, 68.5),
    (16, 16, 1.0, 1.0, 2.55, 0.2, 60.0),
]


@pytest.mark.all
@pytest.mark.parametrize(("ranks", "micros", "i", "w", "fb", "comm", "best_known"), LARGER)
def test_within_2_percent_of_what_is_known_of_larger_ones(
    ranks: int, micros: int, i: float, w: float, fb: float, comm: float, best_known: float
) -> None:
    costs = CostModel(i=i, w=w, fb=fb, comm=comm)
    plan = make_plan("dualpipe", ranks, micros, costs, optimize=True, tries=100_000)
    check_plan(plan)
    assert max(peak_activations(plan)) <= ranks + 1
    assert simulate(plan, costs).makespan <= 1.02 * best_known


def test_more_tries_make_shorter_plans() -> None:
    costs = CostModel(i=1.4, w=0.6, fb=2.1, comm=0.3)
    for cap in (None, 6):
        plans = [make_plan("dualpipe", 4, 8, costs, True, cap, tries=tries) for tries in (1, 300, None, 10_000)]
        times = [makespan_of(plan, costs) for plan in plans]
        assert times == sorted(times, reverse=True) and times[-1] < times[1] < times[0]
    check_plan(make_plan("dualpipe", 8, 200, costs, True, tries=1))


@pytest.mark.parametrize(
    ("schedule", "costs", "optimize", "cap", "tries"),
    [
        ("dualpipe", CostModel(comm=0.1), True, None, 0),
        ("dualpipe", CostModel(comm=0.1), False, None, 9),
        ("dualpipe", CostModel(), True, None, 9),
        ("zbv", CostModel(comm=0.1), True, 3, 9),
        ("vhalf", CostModel(comm=0.1), True, None, 9),
        ("1f1b", CostModel(comm=0.1), True, None, 9),
        ("interleaved", CostModel(comm=0.1), True, None, 9),
    ],
)
def test_tries_without_effect(schedule: str, costs: CostModel, optimize: bool, cap: int | None, tries: int) -> None:
    with pytest.raises(PlanError, match=f"tries={tries} has no effect"):
        make_plan(schedule, 4, 8, costs, optimize, cap, tries=tries)
