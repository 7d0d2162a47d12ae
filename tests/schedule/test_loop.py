"""The loop placement: stages in rounds over the ranks, its edges, its plans as files, costs and bounds on it."""

import pytest

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.cuts.balanced import balance_pairs, balanced_cuts, rank_loads
from dualpipe_engine.schedule.orders.registry import placements_on
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.placement import LOOP, VEE, Placement
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.bound import plan_bound
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate


def test_stages_go_round():
    placement = Placement(LOOP, 3, 4)
    assert (placement.num_stages, placement.parts, placement.num_directions) == (12, 4, 1)
    assert [placement.stages_of(rank) for rank in range(3)] == [(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)]
    assert [placement.rank(stage) for stage in range(12)] == [0, 1, 2] * 4
    assert all(placement.replicas(stage) == (placement.rank(stage),) for stage in range(12))


def test_the_last_rank_is_joined_to_the_first():
    assert Placement(LOOP, 4, 2).edges() == ((0, 1), (0, 3), (1, 0), (1, 2), (2, 1), (2, 3), (3, 0), (3, 2))
    assert Placement(LOOP, 2, 2).edges() == ((0, 1), (1, 0))
    assert Placement(LOOP, 1, 3).edges() == ()
    assert Placement(LOOP, 4, 1).edges() == Placement("linear", 4).edges()


def test_what_is_no_loop():
    with pytest.raises(PlanError, match="loop needs stages_per_rank"):
        Placement(LOOP, 4)
    with pytest.raises(PlanError, match="vee has a fixed number of stages a rank"):
        Placement(VEE, 4, 2)


def test_both_neighbours_of_two_ranks_are_the_same_rank():
    """What stage 0 and stage 2 pass on, and the gradients of stages 2 and 3, share the edges of two ranks."""
    lowered = lower(make_plan("interleaved", 2, 5))
    verify(lowered, recv_buffers=2)
    sent = {(op.kind, op.stage) for op in lowered.programs[1] if op.kind.startswith("SEND")}
    assert sent == {("SEND_F", 1), ("SEND_B", 1), ("SEND_B", 3)}


@pytest.mark.parametrize("schedule", ["interleaved", "interleaved_zb"])
@pytest.mark.parametrize(("ranks", "stages"), [(1, 2), (2, 3), (4, 2), (3, 1)])
def test_a_plan_is_a_file(tmp_path, schedule, ranks, stages):
    plan = make_plan(schedule, ranks, 4, stages_per_rank=stages)
    for name, text in (("plan.json", plan.to_json()), ("plan.csv", plan.to_csv())):
        path = tmp_path / name
        path.write_text(text)
        found = Plan.load(path)
        assert found.programs == plan.programs
        assert found.placement.num_stages == plan.placement.num_stages
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="whole number"):
        Plan.from_json(plan.to_json().replace(f'"stages_per_rank": {stages}', '"stages_per_rank": "two"'))


def test_costs_are_cut_into_as_many_parts():
    costs = CostModel((3.0, 6.0), 1.5, (0.0, 3.0), activation_bytes=(9, 4))
    placed = costs.for_placement(Placement(LOOP, 2, 3))
    assert placed == CostModel(
        (1.0,) * 3 + (2.0,) * 3, 0.5, (0.0,) * 3 + (1.0,) * 3, activation_bytes=(3,) * 3 + (2,) * 3
    )
    joined = placed.joined(3)
    assert (joined.f, joined.i, joined.w) == (costs.f, costs.i, costs.w)


def test_no_interleaved_plan_beats_its_bound():
    for ranks, micros, stages in ((4, 8, 2), (2, 1, 4), (3, 7, 3)):
        for costs in (CostModel(), CostModel(1, 1.3, 0.7, 2.4, 0.1), CostModel(1, 2, 0)):
            for schedule in ("interleaved", "interleaved_zb"):
                plan = make_plan(schedule, ranks, micros, costs, optimize=True, stages_per_rank=stages)
                assert 0.4 * simulate(plan, costs).makespan < plan_bound(plan, costs) <= simulate(plan, costs).makespan


def test_what_a_rank_holds_of_a_linear_cut():
    assert Placement(LOOP, 2, 2).held([10, 30], 0) == 20
    assert Placement(VEE, 2).held([10, 30], 1) == 20
    assert Placement("bidirectional", 2).held([10, 30], 1) == 40
    assert Placement("linear", 2).held([10, 30], 1) == 30


def test_all_placements_of_some_layers():
    found = placements_on(3, 10)
    assert {placement.key for placement in found} == {"linear", "vee", "loop of 1", "loop of 2", "loop of 3"}
    assert "bidirectional" in {placement.key for placement in placements_on(2, 2)}


def test_a_heavy_head_takes_layers_from_its_rank():
    """61 layers and a head of 3 on 16 stages: the rank of the head has fewer other layers."""
    weights, placement = [0.2, *[1.0] * 60, 3.0], Placement(LOOP, 4, 4)
    even, loose = balanced_cuts(weights, placement, (0.0, 0.3))
    assert max(rank_loads(weights, even, placement)) == 16
    assert max(rank_loads(weights, loose, placement)) <= 16 * 1.3
    assert balance_pairs([1.0] * 8, placement=Placement(LOOP, 2, 2)) == (0, 2, 4, 6, 8)
    with pytest.raises(PlanError, match="7 layers cannot fill 8 stages"):
        balance_pairs([1.0] * 7, Placement(LOOP, 4, 2))
