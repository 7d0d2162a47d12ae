"""The columns that passes hand on with a plan are those of its programs."""

from __future__ import annotations

import pytest
from plan_checks import check_columns

from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.passes.lower import forward_only, lower
from dualpipe_engine.schedule.passes.offload import offload
from dualpipe_engine.schedule.passes.rewrite import pair_up, safe_fuse, unpair
from dualpipe_engine.schedule.passes.wfill import wfill
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, LOOP, VEE, Placement
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pass_hands_on_the_columns_of_its_plan(schedule):
    costs = CostModel(fb=2.25)
    for ranks, micros in ((2, 1), (4, 9), (6, 16)):
        plan = make_plan(schedule, ranks, micros)
        each = costs.for_placement(plan.placement)
        paired, filled = pair_up(plan, each), wfill(plan, each, theta=0.3)
        made = [
            paired,
            unpair(paired),
            *(unpair(paired, last) for last in (1, 2, ranks)),
            filled,
            wfill(paired, each, 2),
        ]
        made += [safe_fuse(filled, each), make_plan(schedule, ranks, micros, each, True)]
        for found in [*made, lower(plan), lower(offload(plan, True)), *map(lower, made)]:
            check_columns(found)


@pytest.mark.parametrize(
    "placement", [Placement(LINEAR, 3), Placement(BIDIRECTIONAL, 4), Placement(VEE, 2), Placement(LOOP, 2, 3)]
)
def test_without_a_tail_too(placement):
    for micros in (1, 4):  # 1: a rank of `bidirectional` may run nothing
        check_columns(lower(forward_only(placement, micros), train=False))
        check_columns(lower(forward_only(placement, micros)))
