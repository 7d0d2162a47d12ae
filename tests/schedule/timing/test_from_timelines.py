import pytest

from dualpipe_engine.schedule.op import FB
from dualpipe_engine.schedule.orders import dualpipe, zb1p
from dualpipe_engine.schedule.orders.paired import paired_plan
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.from_timelines import measured_costs
from dualpipe_engine.schedule.timing.simulate import simulate


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("micros", [1, 2, 5, 16])
def test_the_paired_plan_is_valid_and_pairs_all_it_can(ranks, micros):
    plan = paired_plan(ranks, micros)
    verify(lower(plan))
    pairs = [sum(op.kind == FB for op in program) for program in plan.programs]
    assert pairs == [max(0, micros - (ranks - stage)) for stage in range(ranks)]


def test_costs_come_back_out_of_timelines():
    costs = CostModel((1.0, 2.0, 3.0), (1.5, 2.5, 1.0), (0.5, 1.0, 2.0), (2.4, 5.0, 5.0))
    timelines = [simulate(zb1p.generate(3, 9), costs), simulate(paired_plan(3, 9), costs)]
    found = measured_costs(timelines, 3)
    for name in ("f", "i", "w", "fb"):
        assert getattr(found, name) == pytest.approx(getattr(costs, name))


def test_pairs_of_two_stages_count_for_both():
    costs = CostModel(1.0, 1.0, 1.0, 2.25)
    found = measured_costs([simulate(dualpipe.generate(4, 12), costs)], 4)
    assert found.fb == pytest.approx((2.25,) * 4)


def test_without_pairs_nothing_overlaps():
    found = measured_costs([simulate(zb1p.generate(2, 4), CostModel())], 2)
    assert found.fb is None and found.f == (1.0, 1.0)
