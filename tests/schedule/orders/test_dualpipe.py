"""The order must be that of DeepSeek's implementation, and every pruned plan must be complete and legal."""

import pytest
from plan_checks import check_plan, order_digest

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.orders.dualpipe import generate
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate

# (ranks, micro-batches): SHA-256 of the order, obtained from the control flow of DualPipe.step of deepseek-ai/DualPipe
# (dualpipe/dualpipe.py) with each compute call replaced by a line of text; see plan_checks.order_digest.
DEEPSEEK = {
    (2, 4): "a63ec625d73abd3e8456cd2b182e31872e3c59b154e733e50be945662e648d4d",
    (4, 8): "cae746dcf9dc716680e41899251e96b09ea05afa3a2050dd7e6b6ce13dccc377",
    (4, 10): "e1cb1c184780b4205dee6927877d352cda5387d9950b5358e0350935f89efb70",
    (8, 16): "77f45ae6dbd424d7ecc224fc60006a5e7293cbe4e403a03c10e6f148cd415faa",
    (8, 20): "3f8bc8cde60000637a77dd1991eef379214eb324e482ed58f64fab6631cf20a1",
    (16, 64): "1d4224c15457bafab7a8a50b5f5fa17237fda26174352d07808ab85c5e22aef0",
}

# The same recording for 4 ranks and 8 micro-batches, in full.
GOLDEN = """\
0F0 0F2 0F4 3F1 3I1 3W1 3F3 (0F6;3B3)FB (3F5;0B0)FB 3B5 (3F7;0B2)FB 3B7 0I4 0W4 0I6 0W6
1F0 2F1 1F2 2F3 1F4 2B1 (2F5;1B0)FB (1F6;2B3)FB (2F7;1B2)FB 2B5 1B4 2I7 1I6 2W7 1W6
1F1 2F0 1F3 2F2 1F5 2B0 (2F4;1B1)FB (1F7;2B2)FB (2F6;1B3)FB 2B4 1B5 2I6 1I7 2W6 1W7
0F1 0F3 0F5 3F0 3I0 3W0 3F2 (0F7;3B2)FB (3F4;0B1)FB 3B4 (3F6;0B3)FB 3B6 0I5 0W5 0I7 0W7"""


@pytest.mark.parametrize(("num_ranks", "num_micro"), DEEPSEEK)
def test_order_is_that_of_deepseek(num_ranks: int, num_micro: int) -> None:
    assert order_digest(generate(num_ranks, num_micro)) == DEEPSEEK[num_ranks, num_micro]


def test_golden_text() -> None:
    assert [" ".join(row) for row in generate(4, 8).texts()] == GOLDEN.splitlines()


def test_any_number_of_micro_batches() -> None:
    for num_ranks in range(2, 21, 2):
        for num_micro in [*range(1, 2 * num_ranks + 4), 5 * num_ranks + 1]:
            plan = generate(num_ranks, num_micro)
            check_plan(plan)
            assert max(peak_activations(plan)) <= min(num_ranks + 1, num_micro)


@pytest.mark.parametrize("fb", [2.0, 2.25, 3.0])
def test_makespan_formula(fb: float) -> None:
    for num_ranks in (2, 4, 6, 8, 16):
        for num_micro in range(2 * num_ranks, 5 * num_ranks, 2):
            makespan = simulate(generate(num_ranks, num_micro), CostModel(fb=fb)).makespan
            assert makespan == (num_micro - num_ranks / 2 - 2) * fb + 5 * num_ranks / 2 + 4


def test_pairs_make_up_the_steady_state() -> None:
    for program in generate(8, 64).programs:
        assert sum(op.kind == "FB" for op in program) > 0.8 * 64


@pytest.mark.parametrize("num_ranks", [1, 3, 7])
def test_odd_ranks(num_ranks: int) -> None:
    with pytest.raises(PlanError, match=f"even number of pipeline ranks, got {num_ranks}.*dualpipev"):
        generate(num_ranks, 8)


def test_no_micro_batch() -> None:
    with pytest.raises(PlanError, match="at least one micro-batch"):
        generate(4, 0)
