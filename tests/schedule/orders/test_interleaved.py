"""Interleaved 1F1B and its zero-bubble form: orders, bubble and memory for any ranks, micro-batches and stages."""

import pytest
from plan_checks import check_plan

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.orders import interleaved, interleaved_zb, one_f_one_b
from dualpipe_engine.schedule.orders.registry import known_schedule, placement_of
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate


def texts(plan):
    return [" ".join(row) for row in plan.texts()]


def test_golden_text():
    assert texts(interleaved.generate(2, 2)) == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ]
    assert texts(interleaved.generate(2, 3)) == [
        "0F0 0F1 2F0 2F1 0F2 2B0 2B1 2F2 0B0 0B1 2B2 0B2",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1B1 3F2 3B2 1B2",
    ]
    assert texts(interleaved_zb.generate(2, 2)) == [
        "0F0 0F1 2F0 2F1 2I0 2W0 2I1 0I0 0I1 2W1 0W0 0W1",
        "1F0 1F1 3F0 3I0 3F1 3I1 1I0 1I1 3W0 3W1 1W0 1W1",
    ]


def test_any_number_of_ranks_micro_batches_and_stages():
    for num_ranks in range(1, 6):
        for stages in range(1, 5):
            for num_micro in {1, 2, num_ranks, num_ranks + 1, 2 * num_ranks - 1, 3 * num_ranks + 2}:
                for schedule in (interleaved, interleaved_zb):
                    plan = schedule.generate(num_ranks, num_micro, stages)
                    check_plan(plan)
                    assert max(peak_activations(plan)) <= interleaved.cap(num_ranks, stages)


@pytest.mark.parametrize(("num_ranks", "stages"), [(2, 2), (4, 2), (4, 4), (8, 2), (8, 4), (5, 8)])
def test_the_bubble_is_a_part_of_that_of_one_stage_a_rank(num_ranks, stages):
    """(PP-1)(F+B)/v, and (PP-1)(F+I-W)/v where W waits, in times of a full stage."""
    for rounds in (1, 2, 4):
        plan = make_plan("interleaved", num_ranks, rounds * num_ranks, stages_per_rank=stages)
        costs = CostModel().for_placement(plan.placement)
        assert max(simulate(plan, costs).bubble()) == pytest.approx((num_ranks - 1) * 3 / stages)
        plan = make_plan("interleaved_zb", num_ranks, rounds * num_ranks, stages_per_rank=stages)
        assert max(simulate(plan, costs).bubble()) == pytest.approx((num_ranks - 1) / stages)


@pytest.mark.parametrize("num_micro", [15, 17, 20, 31])
def test_weight_gradients_fill_a_round_that_is_not_full(num_micro):
    plan = make_plan("interleaved_zb", 8, num_micro, stages_per_rank=4)
    assert simulate(plan, CostModel().for_placement(plan.placement)).makespan <= 3 * num_micro + 2
    whole = make_plan("interleaved", 8, num_micro, stages_per_rank=4)
    assert simulate(whole, CostModel().for_placement(whole.placement)).makespan < 3 * (num_micro + 7)


def test_transfers_are_hidden_in_full_rounds():
    """A hop of a third of a forward costs its way through the pipeline once, not in every round."""
    costs = CostModel(0.5, 0.5, 0.5, comm=1 / 6)
    lost = []
    for num_micro in (8, 32):
        plan = interleaved.generate(4, num_micro)
        lost.append(simulate(plan, costs).makespan - 3 * num_micro)
    assert lost[0] == pytest.approx(lost[1])


def test_one_stage_a_rank_is_1f1b():
    for num_ranks, num_micro in ((1, 2), (3, 2), (4, 9)):
        assert (
            interleaved.generate(num_ranks, num_micro, 1).programs
            == one_f_one_b.generate(num_ranks, num_micro).programs
        )


def test_a_cap_is_kept_or_refused():
    assert max(peak_activations(make_plan("interleaved", 4, 8, activation_cap=11))) == 11
    with pytest.raises(PlanError, match="the smallest cap that works is 11"):
        make_plan("interleaved", 4, 8, activation_cap=10)


@pytest.mark.parametrize(
    ("schedule", "stages", "text"),
    [
        ("zbv", 2, "zbv has a fixed number of stages a rank: leave stages_per_rank out, or use interleaved"),
        ("1f1b", 1, "1f1b has a fixed number of stages a rank"),
        ("interleaved", 0, "stages_per_rank starts at 1, got 0"),
        ("interleaved_zb", 10**6, "a pipeline has at most 1,000,000 stages"),
    ],
)
def test_stages_that_make_no_sense(schedule, stages, text):
    with pytest.raises(PlanError, match=text):
        make_plan(schedule, 4, 8, stages_per_rank=stages)


def test_the_registry_knows_the_stages():
    assert known_schedule("interleaved").stages_per_rank == 2
    assert known_schedule("interleaved", 3).default_cap(4) == 3 * 4 + 3
    assert placement_of("interleaved_zb", 4, 3).num_stages == 12
