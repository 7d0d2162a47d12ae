import random
import time

import pytest
from plan_checks import longest_path

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import STEP, Op
from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.placement import Placement
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate


def plan_of(placement: Placement, *rows: str, num_micro: int = 2) -> Plan:
    return Plan(placement, num_micro, tuple(tuple(map(Op.parse, row.split())) for row in rows))


def test_start_and_end_of_every_op() -> None:
    plan = plan_of(Placement("linear", 2), "0F0 0F1 0B0 0B1", "1F0 1I0 1W0 1F1 1B1")
    timeline = simulate(plan, CostModel(f=1, i=2, w=3, comm=0.5))
    assert [(str(op), start, end) for rank, op, start, end in timeline.spans] == [
        ("0F0", 0, 1),
        ("0F1", 1, 2),
        ("0B0", 5, 10),
        ("0B1", 13.5 + 0.5, 19),
        ("1F0", 1.5, 2.5),
        ("1I0", 2.5, 4.5),
        ("1W0", 4.5, 7.5),
        ("1F1", 7.5, 8.5),
        ("1B1", 8.5, 13.5),
    ]
    assert timeline.makespan == 19


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_agrees_with_longest_path(schedule: str) -> None:
    rng = random.Random(schedule)
    for num_ranks, num_micro in [(2, 1), (2, 5), (4, 3), (4, 9), (6, 12)]:
        plan = make_plan(schedule, num_ranks, num_micro)
        stages = range(plan.placement.num_stages)
        f, i, w = (tuple(rng.uniform(0.5, 1.5) for _ in stages) for _ in range(3))
        fb = tuple(0.8 * sum(column) for column in zip(f, i, w, strict=True))
        for costs in (CostModel(f, i, w, fb, comm=rng.random()), CostModel(fb=2.25), CostModel(comm=0.25)):
            assert simulate(plan, costs).makespan == pytest.approx(longest_path(plan, costs))


def test_transfers_cost_nothing_within_a_rank() -> None:
    plan = make_plan("dualpipev", 1, 2)
    assert simulate(plan, CostModel(comm=5)).makespan == simulate(plan, CostModel()).makespan


def test_ignores_transfers_and_tail_ops() -> None:
    plan = make_plan("1f1b", 2, 3)
    noise = (Op.parse("0SEND_F0"), Op.parse("0REDUCE"), Op(STEP, -1, -1))
    noisy = Plan(plan.placement, 3, (plan.programs[0] + noise, noise + plan.programs[1]))
    assert simulate(noisy, CostModel()).spans == simulate(plan, CostModel()).spans
    assert peak_activations(noisy) == peak_activations(plan)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            ("0F0 0B0", "1F0"),
            r"rank 0 cannot run 0B0 \(op 1\): the input gradient of stage 1 .* no rank runs 1B0 or 1I0",
        ),
        (
            ("0B0 0F0", "1F0 1B0"),
            r"rank 0 cannot run 0B0 \(op 0\): the output of stage 0 .* rank 0 has 0F0 only after 0B0",
        ),
        (("0F0 0W0", "1F0 1B0"), r"rank 0 cannot run 0W0 \(op 1\): .* no rank runs 0B0 or 0I0"),
        (("0F1 0F0 0B0 0B1", "1F0 1B0 1F1"), "rank 0 cannot run 0B1 .* no rank runs 1B1"),
        (
            ("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"),
            r"rank 0 cannot run 0B0 .* rank 1 has 1B0 only after 1F1, which waits",
        ),
        (("0F0 2F0", "1F0"), "rank 0 cannot run 2F0: there are 2 stages"),
        (("0F0", "1F2"), "rank 1 cannot run 1F2: .* 2 micro-batches"),
    ],
)
def test_plans_that_cannot_complete(rows: tuple[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        simulate(plan_of(Placement("linear", 2), *rows), CostModel())


def test_two_ranks_may_wait_for_one_result() -> None:
    plan = plan_of(Placement("linear", 3), "0F0", "1F0", "1F0 2F0")
    assert len(simulate(plan, CostModel()).spans) == 4
    with pytest.raises(PlanError, match=r"rank 1 cannot run 1F0 .* no rank runs 0F0"):
        simulate(plan_of(Placement("linear", 3), "0F1", "1F0", "1F0 2F0"), CostModel())


def test_costs_must_fit_the_placement() -> None:
    with pytest.raises(PlanError, match="cost f has 2 numbers, but there are 4 stages"):
        simulate(make_plan("zbv", 2, 2), CostModel(f=(1.0, 1.0)))


def test_peak_activations() -> None:
    plan = plan_of(
        Placement("bidirectional", 2),
        "0F0 1F1 (0F2;1B1)FB 0I0 (1F3;0B2)FB 1I3 0W0 1W3",  # 1 2 3 2 . 3 2 . 1 0
        "1F0",
        num_micro=4,
    )
    assert peak_activations(plan) == [3, 1]
    pair_with_i = plan_of(Placement("linear", 1), "0F0 (0F1;0I0)FB 0F2 0W0 0B1 0B2", num_micro=3)
    assert peak_activations(pair_with_i) == [3]


def test_time_grows_with_the_ops_and_not_faster() -> None:
    least = {}
    for micros in (256, 1024):
        seconds = []
        for _ in range(3):
            begin = time.process_time()
            plan = make_plan("dualpipe", 32, micros)
            simulate(plan, CostModel(fb=2.25))
            seconds.append(time.process_time() - begin)
        least[plan.num_ops] = min(seconds)
    few, many = least
    assert many > 3 * few
    assert least[many] / least[few] < 2.5 * many / few
