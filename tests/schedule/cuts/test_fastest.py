"""Cuts chosen by simulation: the reference gain, never slower than its candidates, costs of stages, errors."""

from functools import partial

import pytest

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.cuts.balanced import balance_pairs, equal_counts
from dualpipe_engine.schedule.cuts.fastest import best_cut, compare_cuts, costs_of_cut
from dualpipe_engine.schedule.orders.registry import SCHEDULES, placement_of
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate

#: In units of the F of one eighth of the blocks: 160 blocks, the first with an embedding of 0.2 F, the last with a head
#: of 1 F. A layer takes three times its forward: F = I = W.
REFERENCE = [3 * (0.05 + 0.2), *[3 * 0.05] * 158, 3 * (0.05 + 1)]


def test_reference_gain():
    """8 ranks, 32 micro-batches, no overlap, reference order: 153.6 with 20 layers a stage, 117.3 cut by pairs."""
    rows = {row.schedule: row for row in compare_cuts(REFERENCE, 8, 32, CostModel(), optimize=False)}
    dualpipe = rows["dualpipe"]
    assert dualpipe.equal.layers == [20] * 8
    assert dualpipe.equal.makespan == pytest.approx(153.6)
    assert dualpipe.best.makespan == pytest.approx(117.3)
    assert dualpipe.saved == pytest.approx(1 - 117.3 / 153.6)
    assert all(row.best.makespan < row.equal.makespan for row in rows.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("overlap", [1.0, 0.75])
def test_best_cut_is_no_slower_than_other_cuts(schedule, overlap):
    weights = [0.2, 0.6, 0.6, 0.6, *[1.0, 1.2, 1.2] * 7, 2.5]
    costs = CostModel(fb=3 * overlap)
    plan_for = partial(make_plan, schedule, 4, 8, optimize=True)
    placement = placement_of(schedule, 4)
    found = best_cut(weights, placement, costs, plan_for)
    for bounds in (equal_counts(len(weights), placement.num_stages), balance_pairs(weights, placement)):
        placed = costs_of_cut(weights, bounds, costs)
        assert found.makespan <= simulate(plan_for(placed), placed).makespan


def test_costs_of_a_cut_divide_the_time_of_the_layers():
    costs = costs_of_cut([1.0, 2.0, 3.0], (0, 1, 3), CostModel(1, 2, 1, 3, comm=0.5))
    assert costs.at(0) == (0.25, 0.5, 0.25, 0.75)
    assert costs.at(1) == (1.25, 2.5, 1.25, 3.75)
    assert costs.comm == 0.5
    with pytest.raises(PlanError, match="each stage"):
        costs_of_cut([1.0], (0, 1), CostModel(f=(1.0,)))
    with pytest.raises(PlanError, match="no length"):
        costs_of_cut([1.0], (0, 1), CostModel(0, 0, 0, 0))


def test_schedules_that_cannot_run_say_why():
    rows = {row.schedule: row for row in compare_cuts([1.0] * 5, 3, 4, CostModel())}
    assert "even number" in rows["dualpipe"].reason
    assert "5 layers cannot fill 6 stages" in rows["zbv"].reason
    assert rows["dualpipe"].best is None and rows["dualpipe"].saved == 0
    assert rows["1f1b"].reason == "" and sum(rows["1f1b"].best.layers) == 5
