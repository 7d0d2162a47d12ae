from itertools import pairwise

import pytest
from plan_checks import check_plan

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import F
from dualpipe_engine.schedule.orders import vhalf, vmin
from dualpipe_engine.schedule.orders.blocks import HALF, Block, block, widest, widths
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate

#: Of the authors' own code (sail-sg/zero-bubble-pipeline-parallelism): ranks, micro-batches -> makespan and most
#: activations of half a stage, for V-Half and V-Min, with F = I = W = 1 for a whole stage.
AUTHORS = {
    (4, 8): ((26.5, 6), (29.5, 4)),
    (4, 16): ((50.5, 6), (53.5, 4)),
    (6, 18): ((59.5, 8), (62.5, 6)),
    (8, 8): ((32.5, 10), (37.5, 8)),
    (8, 16): ((56.5, 10), (61.5, 8)),
    (8, 32): ((104.5, 10), (109.5, 8)),
    (12, 24): ((86.5, 14), (92.5, 10)),
    (16, 32): ((116.5, 18), (125.5, 12)),
}


def between(plan: Plan) -> int:
    """Most activations between F and I on a rank, counted op by op."""
    most = 0
    for program in plan.programs:
        alive = 0
        for op in program:
            alive += 1 if op.kind == F else -1
            most = max(most, alive)
    return most


def test_blocks_are_ways_there_and_back_without_two_ops_at_once() -> None:
    for num_ranks in range(1, 15):
        for found in (*(block(num_ranks, width) for width in widths(num_ranks)), Block((HALF,) * (num_ranks - 1))):
            there, second, out, home = zip(*found.times, strict=True)
            way = [*there, *reversed(second), *out, *reversed(home)]
            assert all(a < b for a, b in pairwise(way))
            assert all(len({step % found.period for step in row}) == 4 for row in found.times)


def test_wider_blocks_hold_more() -> None:
    for num_ranks in range(1, 17):
        for num_micro in (1, 2, 5, 40):
            peaks = [block(num_ranks, width).peak(num_micro) for width in widths(num_ranks)]
            assert peaks == sorted(peaks) and peaks[0] <= 2 and peaks[-1] <= 2 * num_ranks
        assert peaks == [block(num_ranks, width).peak(3 * num_ranks) for width in widths(num_ranks)]


def test_peak_is_that_of_the_order() -> None:
    for num_ranks in (1, 2, 3, 5, 6):
        for num_micro in (1, 2, 3, 7, 20):
            for width in widths(num_ranks):
                found = block(num_ranks, width)
                assert found.peak(num_micro) == between(found.plan(num_micro))


def test_widest_takes_the_last_that_fits() -> None:
    for cap in range(2, 17):
        width = widest(8, 32, cap)
        assert block(8, width).peak(32) <= cap
        assert width == widths(8)[-1] or block(8, width + 1).peak(32) > cap


def test_golden_text() -> None:
    assert [" ".join(row) for row in vmin.generate(3, 3).texts()] == [
        "0F0 0F1 0F2 5F0 5I0 5W0 5F1 5I1 0I0 5W1 0W0 5F2 5I2 0I1 5W2 0W1 0I2 0W2",
        "1F0 1F1 1F2 4F0 4I0 4W0 4F1 1I0 1W0 4I1 4W1 4F2 1I1 4I2 1W1 4W2 1I2 1W2",
        "2F0 3F0 2F1 3F1 3I0 2I0 3W0 2F2 2W0 3F2 3I1 2I1 3W1 2W1 3I2 2I2 3W2 2W2",
    ]


@pytest.mark.parametrize("schedule", [vhalf, vmin])
def test_any_number_of_ranks_and_micro_batches(schedule) -> None:
    for num_ranks in (1, 2, 3, 4, 5, 6, 7, 9):
        for num_micro in (1, 2, 3, 5, 8, 13, 21):
            plan = schedule.generate(num_ranks, num_micro)
            check_plan(plan)
            verify(lower(plan), activation_cap=schedule.cap(num_ranks))


@pytest.mark.parametrize("schedule", [vhalf, vmin])
def test_counts_below_1_are_refused(schedule) -> None:
    for counts in ((0, 4), (4, 0)):
        with pytest.raises(PlanError, match="at least one"):
            schedule.generate(*counts)


@pytest.mark.parametrize(("ranks", "micros"), AUTHORS)
def test_as_fast_and_as_small_as_the_authors(ranks: int, micros: int) -> None:
    for schedule, (makespan, peak) in zip((vhalf, vmin), AUTHORS[ranks, micros], strict=True):
        plan = schedule.generate(ranks, micros)
        assert simulate(plan, CostModel().for_placement(plan.placement)).makespan <= 1.01 * makespan
        assert max(peak_activations(plan)) <= peak + 1


def test_half_and_a_third_of_the_activations_of_1f1b() -> None:
    assert max(peak_activations(vhalf.generate(8, 32))) / 2 <= (8 + 2) / 2
    assert max(peak_activations(vmin.generate(8, 32))) / 2 <= (8 + 4) / 3
