import pytest
from plan_checks import check_plan

from dualpipe_engine.schedule.orders.one_f_one_b import generate
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate


def test_golden_text() -> None:
    assert [" ".join(row) for row in generate(3, 4).texts()] == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_any_number_of_ranks_and_micro_batches() -> None:
    for num_ranks in range(1, 15):
        for num_micro in range(1, 30):
            plan = generate(num_ranks, num_micro)
            check_plan(plan)
            assert peak_activations(plan) == [min(num_ranks - rank, num_micro) for rank in range(num_ranks)]


@pytest.mark.parametrize(("num_micro", "makespan"), [(2, 27), (8, 45), (16, 69), (32, 117), (64, 213)])
def test_makespan_on_8_ranks(num_micro: int, makespan: float) -> None:
    assert simulate(generate(8, num_micro), CostModel()).makespan == makespan


def test_bubble_formula() -> None:
    for num_ranks in (2, 5, 8):
        for num_micro in (num_ranks, 3 * num_ranks):
            timeline = simulate(generate(num_ranks, num_micro), CostModel(1, 1.3, 0.7))
            assert max(timeline.bubble()) == pytest.approx((num_ranks - 1) * 3)
