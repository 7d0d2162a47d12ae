"""Both twins issue the reductions of ZeRO-2 in one order, which no rank has to wait for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_engine.engine.reduction.order import contributions, reduction_order
from dualpipe_engine.schedule.op import Op, W
from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, Placement
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel

COSTS = [CostModel(), CostModel(fb=2.25), CostModel(i=1.3, w=0.7)]


def dualpipe_plans():
    for pp in (2, 4, 8):
        for micros in (1, 2, 3, pp, pp + 1, 2 * pp - 1, 2 * pp, 2 * pp + 3):
            for costs in COSTS:
                for optimize in (False, True):
                    yield make_plan("dualpipe", pp, micros, costs, optimize=optimize)


def test_twins_run_their_weight_gradients_in_one_order_when_micro_batches_are_even():
    """What makes ZeRO-2 cheap: then no gradient waits for its turn."""
    for plan in dualpipe_plans():
        if plan.num_micro % 2 == 0:
            for rank in range(plan.placement.num_ranks):
                own = contributions(plan, rank)
                assert own == contributions(plan, plan.placement.num_ranks - 1 - rank)
                assert own == [stage for stage, _ in reduction_order(plan, rank)]


def assert_sound(plan, rank):
    """Same list for both twins; each stage's reductions ascending, as many as the busier copy has contributions."""
    order = reduction_order(plan, rank)
    twins = plan.placement.replicas(plan.placement.stages_of(rank)[0])
    counts = [Counter(contributions(plan, twin)) for twin in twins]
    for twin in twins:
        assert reduction_order(plan, twin) == order
    for stage in plan.placement.stages_of(rank):
        most = max(count[stage] for count in counts)
        assert [k for found, k in order if found == stage] == list(range(most))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule):
    for micros in (1, 3, 8, 11):
        for optimize in (False, True):
            plan = make_plan(schedule, 4, micros, optimize=optimize)
            for rank in range(4):
                assert_sound(plan, rank)
                if plan.placement.name != BIDIRECTIONAL:
                    assert [stage for stage, _ in reduction_order(plan, rank)] == contributions(plan, rank)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from((0, 1)), max_size=12), st.lists(st.sampled_from((0, 1)), max_size=12))
def test_any_two_programs(first, second):
    """Plan files may give twins any orders and counts."""
    programs = tuple(tuple(Op(W, stage, 0) for stage in stages) for stages in (first, second))
    plan = Plan(Placement(BIDIRECTIONAL, 2), 1, programs)
    for rank in (0, 1):
        assert_sound(plan, rank)


def test_a_gradient_waits_for_its_turn_only_where_twins_differ():
    programs = (tuple(Op(W, stage, 0) for stage in (0, 1, 0)), tuple(Op(W, stage, 0) for stage in (1, 0)))
    plan = Plan(Placement(BIDIRECTIONAL, 2), 1, programs)
    assert reduction_order(plan, 0) == [(0, 0), (1, 0), (0, 1)]
