import pytest
from plan_checks import check_plan

from dualpipe_engine.schedule.orders.zb1p import generate
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate


def test_golden_text() -> None:
    assert [" ".join(row) for row in generate(2, 3).texts()] == [
        "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2",
        "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2",
    ]


def test_any_number_of_ranks_and_micro_batches() -> None:
    for num_ranks in range(1, 15):
        for num_micro in range(1, 30):
            plan = generate(num_ranks, num_micro)
            check_plan(plan)
            assert max(peak_activations(plan)) <= min(num_ranks, num_micro)


@pytest.mark.parametrize(
    ("num_micro", "makespan"), [(2, 19), (4, 23), (8, 31), (15, 52), (16, 55), (32, 103), (64, 199)]
)
def test_makespan_on_8_ranks(num_micro: int, makespan: float) -> None:
    assert simulate(generate(8, num_micro), CostModel()).makespan == makespan


def test_bubble_formula() -> None:
    for num_ranks in range(1, 17):
        for num_micro in (num_ranks, 2 * num_ranks + 1, 4 * num_ranks):
            timeline = simulate(generate(num_ranks, num_micro), CostModel())
            assert max(timeline.bubble()) == (num_ranks - 1) * (1 + 2 - 2)
