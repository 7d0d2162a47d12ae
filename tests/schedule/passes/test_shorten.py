import random

import pytest
from plan_checks import check_plan

from dualpipe_engine.schedule.op import Op, atoms
from dualpipe_engine.schedule.orders.registry import KNOWN, placement_of
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.shorten import shorten
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import makespan_of, peak_activations

SPLIT = [name for name, known in KNOWN.items() if known.splits]


def drawn(rng: random.Random, num_stages: int) -> CostModel:
    f, i, w = (tuple(rng.uniform(0.5, 1.5) for _ in range(num_stages)) for _ in "fiw")
    return rng.choice((CostModel(f, i, w, comm=0.3), CostModel(fb=2.25, comm=0.2), CostModel(w=0.6, comm=0.1)))


@pytest.mark.parametrize("schedule", SPLIT)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("draws", [4, pytest.param(60, marks=pytest.mark.all)])
def test_any_plan_stays_sound_and_gets_no_longer(schedule: str, split: bool, draws: int) -> None:
    rng = random.Random(schedule)
    for _ in range(draws):
        num_ranks, num_micro = rng.choice((2, 4, 6)), rng.randint(1, 14)
        costs = drawn(rng, placement_of(schedule, num_ranks).num_stages)
        plan = make_plan(schedule, num_ranks, num_micro, split_backward=split)
        cap = max(peak_activations(plan)) + rng.randint(0, 2)
        found = shorten(plan, costs, cap, 400, split)
        check_plan(found)
        verify(lower(found), activation_cap=cap)
        assert makespan_of(found, costs) <= makespan_of(plan, costs)
        assert split or {part.kind for program in found.programs for op in program for part in atoms(op)} == {"F", "B"}
        assert found == shorten(plan, costs, cap, 400, split)  # on every rank


def test_directions_that_mirror_each_other_still_do() -> None:
    costs = CostModel(i=1.2, w=0.8, fb=2.55, comm=0.2)
    plan = make_plan("dualpipe", 4, 8)
    found = shorten(plan, costs, 5, 1000)
    assert makespan_of(found, costs) < makespan_of(plan, costs)
    for rank, program in enumerate(found.programs):
        other = [
            tuple(Op(part.kind, part.stage, part.micro ^ 1) for part in atoms(op)) for op in found.programs[3 - rank]
        ]
        assert other == [atoms(op) for op in program]
