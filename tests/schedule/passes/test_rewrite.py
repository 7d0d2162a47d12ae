import random
from collections.abc import Iterator

import pytest
from plan_checks import check_plan

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import Op, atoms
from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.passes.rewrite import join, pair_up, safe_fuse, unpair
from dualpipe_engine.schedule.passes.wfill import wfill
from dualpipe_engine.schedule.placement import Placement
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate


def cases(draws: int = 15) -> Iterator[tuple[Plan, CostModel]]:
    rng = random.Random(0)
    for schedule in SCHEDULES:
        for _ in range(draws):
            plan = make_plan(schedule, rng.choice((2, 4, 6)), rng.randint(1, 16))
            f, i, w = (tuple(rng.uniform(0.5, 1.5) for _ in range(plan.placement.num_stages)) for _ in "fiw")
            yield plan, CostModel(f, i, w, comm=rng.choice((0.0, 0.3)))
            yield plan, CostModel(fb=rng.choice((2.25, 3.0)))


def order(plan: Plan) -> list[list[tuple[str, int, int]]]:
    """Forwards and backwards of each rank, in order."""
    return [
        [
            ("F" if op.kind == "F" else "B", op.stage, op.micro)
            for full in program
            for op in atoms(full)
            if op.kind != "W"
        ]
        for program in plan.programs
    ]


@pytest.mark.parametrize("draws", [3, pytest.param(15, marks=pytest.mark.all)])
def test_rewritten_plans_are_legal_and_keep_the_order(draws: int) -> None:
    for plan, costs in cases(draws):
        for skeleton in (plan, unpair(plan), unpair(plan, 2), pair_up(plan, costs)):
            for changed in (
                skeleton,
                wfill(skeleton, costs),
                wfill(skeleton, costs, max(peak_activations(plan)), 0.3),
                safe_fuse(skeleton, costs),
                safe_fuse(wfill(skeleton, costs, 3, 0.6), costs),
                join(skeleton),
            ):
                check_plan(changed)
                assert order(changed) == order(plan)


def test_unpair_leaves_no_pair_and_join_no_split() -> None:
    for plan, _ in cases():
        assert all(op.kind != "FB" for program in unpair(plan).programs for op in program)
        joined = join(plan)
        assert all(op.kind not in "IW" for program in joined.programs for full in program for op in atoms(full))
        assert max(peak_activations(joined)) <= max(peak_activations(plan))


def test_unpair_splits_the_last_pairs_of_every_rank() -> None:
    plan = make_plan("dualpipe", 4, 12)
    for last in range(12):
        for before, after in zip(plan.programs, unpair(plan, last).programs, strict=True):
            pairs = [op for op in before if op.kind == "FB"]
            split = pairs[max(len(pairs) - last, 0) :]
            assert list(after) == [part for op in before for part in (atoms(op) if op in split else (op,))]
    assert unpair(plan, 0) == plan
    assert unpair(plan, 99) == unpair(plan)


def test_pair_up_pairs_the_first_steady_round_of_the_middle_ranks() -> None:
    plan = make_plan("dualpipe", 4, 8)
    paired = pair_up(plan, CostModel())
    assert [before == after for before, after in zip(plan.programs, paired.programs, strict=True)] == [
        True,
        False,
        False,
        True,
    ]
    for rank, (apart, together) in enumerate(((("1F4", "2B1"), "(1F4;2B1)FB"), (("1F5", "2B0"), "(1F5;2B0)FB")), 1):
        texts = plan.texts()[rank]
        at = texts.index(apart[0])
        assert texts[at : at + 2] == list(apart)
        assert paired.texts()[rank] == [*texts[:at], together, *texts[at + 2 :]]


def test_pair_up_leaves_what_would_wait() -> None:
    plan = make_plan("dualpipe", 4, 8)
    # The first gradient needs 5 transfers more than the first forward, and comes when 1F4 ends.
    assert pair_up(plan, CostModel(comm=0.15)) != plan
    assert pair_up(plan, CostModel(comm=2.0)) == plan
    stage_alone = Plan(Placement("linear", 1), 2, (tuple(map(Op.parse, ("0F0", "0F1", "0B0", "0B1"))),))
    assert pair_up(stage_alone, CostModel()) == stage_alone


def test_join_reaches_into_pairs() -> None:
    plan = Plan(Placement("linear", 1), 2, (tuple(map(Op.parse, ("0F0", "(0F1;0I0)FB", "0W0", "0B1"))),))
    assert join(plan).texts() == [["0F0", "(0F1;0B0)FB", "0B1"]]


def test_wfill_meets_the_cap_of_its_skeleton() -> None:
    for plan, costs in cases():
        least = max(peak_activations(wfill(plan, costs, 1)))
        for cap in (least, least + 1, least + 3):
            assert max(peak_activations(wfill(plan, costs, cap))) <= cap


def test_wfill_at_theta_0_delays_nothing_but_forwards_over_the_cap() -> None:
    for plan, costs in cases():
        free = wfill(plan, costs)
        unsplit = Plan(
            plan.placement,
            plan.num_micro,
            tuple(tuple(op for op in program if op.kind != "W") for program in free.programs),
        )
        started = {(span.rank, span.op): span.start for span in simulate(free, costs).spans}
        for span in simulate(unsplit, costs).spans:
            assert started[span.rank, span.op] == pytest.approx(span.start)


def test_theta_trades_delay_for_w() -> None:
    plan = Plan(
        Placement("linear", 2),
        2,
        tuple(tuple(map(Op.parse, row.split())) for row in ("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1")),
    )
    # Rank 0 is idle from 4, when its first I ends, to 5, when the second gradient arrives.
    for w, theta, filled in ((1.0, 0.0, True), (1.2, 0.0, False), (1.2, 0.3, True), (2.0, 0.3, False)):
        texts = wfill(plan, CostModel(w=w), theta=theta).texts()
        assert texts[0] == ["0F0", "0F1", "0I0", *(["0W0", "0I1"] if filled else ["0I1", "0W0"]), "0W1"]


def test_safe_fuse_keeps_every_start() -> None:
    fused = 0
    for plan, costs in cases():
        filled = wfill(unpair(plan), costs)
        before = {
            (part.kind, part.stage, part.micro): s.start for s in simulate(filled, costs).spans for part in atoms(s.op)
        }
        joined = safe_fuse(filled, costs)
        for span in simulate(joined, costs).spans:
            for kind, stage, micro, _ in atoms(span.op):
                fused += kind == "B"
                assert span.start == pytest.approx(before["I" if kind == "B" else kind, stage, micro])
    assert fused > 50


def test_safe_fuse_never_delays_a_waiting_consumer() -> None:
    rows = ("0F0 0I0 0W0 0F1 0I1 0W1", "1F0 1I0 1W0 1F1 1I1 1W1")
    plan = Plan(Placement("linear", 2), 2, tuple(tuple(map(Op.parse, row.split())) for row in rows))
    assert safe_fuse(plan, CostModel()).texts() == [["0F0", "0B0", "0F1", "0B1"], rows[1].split()]


@pytest.mark.parametrize("rewrite", [pair_up, safe_fuse, wfill])
def test_what_stands_twice_is_refused(rewrite):
    plan = Plan.from_csv("0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1\n")
    twice = Plan(plan.placement, 2, (plan.programs[0], (*plan.programs[1], plan.programs[1][0])))
    with pytest.raises(PlanError, match="stands twice"):
        rewrite(twice, CostModel())
