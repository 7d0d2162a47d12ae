"""The order must be that of DeepSeek's DualPipeV, and every pruned plan must be complete and legal."""

import pytest
from plan_checks import check_plan, order_digest

from dualpipe_engine.schedule.orders import dualpipe
from dualpipe_engine.schedule.orders.dualpipev import generate
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate

# As in test_dualpipe.py, from the control flow of DualPipeV.step (dualpipe/dualpipev.py).
DEEPSEEK = {
    (1, 2): "547902192c838d663063874f1b74531aa3ae60b81b59059985610c3340ee45d7",
    (2, 4): "e22244e785a0f17c79c794f18e00f8543dde03a6681fd143994c2d51bc5b32a3",
    (3, 7): "a36805bf8250f83475c00453718319feb191b7f00fb37b7261da30ee7a8ed049",
    (4, 8): "1aab5f60e049de4b7b1c386c0b6a1067413f70dd6b6b9fc3edb089c2a6555fae",
    (8, 20): "dbadf871fc0e2ddc3a56f33a389bae4c4f7113af00c81d7a7a0de81dc2f35ded",
    (16, 40): "b6fcc678a4986306dc488eb9296995933ebabaf62cd63423429040e3ecc72028",
}

GOLDEN = """\
0F0 0F1 0F2 3F0 3I0 3W0 3F1 (0F3;3B1)FB (3F2;0B0)FB 3B2 (3F3;0B1)FB 3B3 0I2 0W2 0I3 0W3
1F0 2F0 1F1 2F1 1F2 2B0 (2F2;1B0)FB (1F3;2B1)FB (2F3;1B1)FB 2B2 1B2 2I3 1I3 2W3 1W3"""


@pytest.mark.parametrize(("num_ranks", "num_micro"), DEEPSEEK)
def test_order_is_that_of_deepseek(num_ranks: int, num_micro: int) -> None:
    assert order_digest(generate(num_ranks, num_micro)) == DEEPSEEK[num_ranks, num_micro]


def test_golden_text() -> None:
    assert [" ".join(row) for row in generate(2, 4).texts()] == GOLDEN.splitlines()


def test_any_number_of_ranks_and_micro_batches() -> None:
    for num_ranks in range(1, 13):
        for num_micro in [*range(1, 2 * num_ranks + 4), 5 * num_ranks + 1]:
            plan = generate(num_ranks, num_micro)
            check_plan(plan)
            assert max(peak_activations(plan)) <= min(2 * num_ranks + 1, 2 * num_micro)


def test_is_dualpipe_cut_in_half() -> None:
    for num_ranks in (1, 2, 3, 4, 8):
        for num_micro in (1, num_ranks, 2 * num_ranks, 5 * num_ranks):
            whole = simulate(dualpipe.generate(2 * num_ranks, 2 * num_micro), CostModel(1, 0.9, 1.2, 2.5))
            half = simulate(generate(num_ranks, num_micro), CostModel(1, 0.9, 1.2, 2.5))
            assert half.makespan == pytest.approx(whole.makespan)


@pytest.mark.parametrize(
    ("num_micro", "fb", "makespan"),
    [(8, 3, 34.5), (16, 3, 55), (32, 3, 103), (64, 3, 199), (16, 2.25, 46.75), (32, 2.25, 82.75), (64, 2.25, 154.75)],
)
def test_makespan_on_8_ranks(num_micro: int, fb: float, makespan: float) -> None:
    plan = generate(8, num_micro)
    assert simulate(plan, CostModel(fb=fb).for_placement(plan.placement)).makespan == makespan
