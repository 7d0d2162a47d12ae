import pytest

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import Op
from dualpipe_engine.schedule.placement import Placement
from dualpipe_engine.schedule.timing.costs import CostModel


def test_uniform_costs() -> None:
    costs = CostModel(1.0, 1.3, 0.7, 2.1)
    seconds = [costs.duration(Op.parse(text)) for text in ("3F7", "0I1", "0W1", "5B2", "(3F7;4B2)FB")]
    assert seconds == [1.0, 1.3, 0.7, 2.0, 2.1]


def test_pair_without_overlap_takes_both_halves() -> None:
    costs = CostModel((1.0, 2.0), (1.0, 3.0), (0.5, 1.0))
    assert costs.duration(Op.parse("(0F7;1B2)FB")) == pytest.approx(5)
    assert costs.duration(Op.parse("(1F7;0B2)FB")) == pytest.approx(3.5)
    assert costs.duration(Op.parse("(1F7;0I2)FB")) == pytest.approx(3)


def test_pair_of_unequal_stages_overlaps_as_much_as_its_stages_do() -> None:
    costs = CostModel((1.0, 2.0), (1.0, 3.0), (1.0, 1.0), (2.4, 6.0))  # factors 0.8 and 1
    assert costs.duration(Op.parse("(0F7;1B2)FB")) == pytest.approx(5 * 0.9)
    assert costs.duration(Op.parse("(0F7;0B2)FB")) == 2.4


def test_pair_with_i_costs_less_but_at_least_the_longer_half() -> None:
    assert CostModel(fb=2.25).duration(Op.parse("(3F7;4I2)FB")) == pytest.approx(1.5)
    assert CostModel(f=1, i=8, w=4, fb=12).duration(Op.parse("(3F7;4I2)FB")) == pytest.approx(9 * 12 / 13)
    assert CostModel(f=1, i=8, w=8, fb=12).duration(Op.parse("(3F7;4I2)FB")) == 8


def test_vee_halves_every_stage() -> None:
    costs = CostModel((1.0, 2.0), 1.0, 0.5, (2.0, 3.0), 0.1, (9, 4))
    assert costs.for_placement(Placement("vee", 2)) == CostModel(
        (0.5, 0.5, 1.0, 1.0), 0.5, 0.25, (1.0, 1.0, 1.5, 1.5), 0.1, (5, 5, 2, 2)
    )
    assert costs.for_placement(Placement("bidirectional", 2)) is costs
    assert CostModel().for_placement(Placement("vee", 2)).fb is None


@pytest.mark.parametrize("wrong", [{"f": -1.0}, {"w": (1.0, -2.0)}, {"comm": float("nan")}, {"fb": -0.1}])
def test_negative_costs(wrong: dict) -> None:
    with pytest.raises(PlanError, match=f"cost {next(iter(wrong))} must not be negative"):
        CostModel(**wrong)


def test_costs_for_other_numbers_of_stages() -> None:
    with pytest.raises(PlanError, match="different numbers of stages"):
        CostModel(f=(1.0, 1.0), w=(1.0,))
    with pytest.raises(PlanError, match="cost f has 2 numbers, but there are 3 stages"):
        CostModel(f=(1.0, 1.0)).for_placement(Placement("linear", 3))
