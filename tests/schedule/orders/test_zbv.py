import pytest
from plan_checks import check_plan

from dualpipe_engine.schedule.orders.zbv import generate
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate


def test_golden_text() -> None:
    assert [" ".join(row) for row in generate(2, 3).texts()] == [
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2",
        "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2",
    ]


def test_any_number_of_ranks_and_micro_batches() -> None:
    for num_ranks in range(1, 11):
        for num_micro in {1, 2, num_ranks, num_ranks + 1, 2 * num_ranks - 1, 2 * num_ranks, 2 * num_ranks + 1, 29}:
            plan = generate(num_ranks, num_micro)
            check_plan(plan)
            assert max(peak_activations(plan)) <= min(2 * num_ranks, 2 * num_micro)


@pytest.mark.parametrize(("num_micro", "makespan"), [(8, 27.5), (14, 45.5), (16, 51.5), (32, 99.5), (64, 195.5)])
def test_makespan_on_8_ranks(num_micro: int, makespan: float) -> None:
    plan = generate(8, num_micro)
    assert simulate(plan, CostModel().for_placement(plan.placement)).makespan == makespan


def test_the_only_bubble_is_the_way_to_the_last_rank() -> None:
    for num_ranks in range(1, 11):
        for num_micro in {num_ranks, num_ranks + 1, 2 * num_ranks - 1, 2 * num_ranks, 3 * num_ranks + 1}:
            timeline = simulate(generate(num_ranks, num_micro), CostModel())
            assert max(timeline.bubble()) == num_ranks - 1
