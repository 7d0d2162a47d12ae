"""Properties of random plans: sound when generated, refused when a mutation makes them unsound.

HYPOTHESIS_PROFILE=long runs 10,000 examples of each.
"""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st
from plan_checks import check_columns, check_plan
from test_lower_verify import is_sound

from dualpipe_engine.schedule.op import Op
from dualpipe_engine.schedule.orders.registry import KNOWN, SCHEDULES, known_schedule, placement_of
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.passes.verify import VerifyError, verify
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.bound import plan_bound
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate

seconds = st.floats(0.05, 4.0)


@st.composite
def plans(draw, most_ranks=8, most_micros=20):
    """(plan, costs of its stages), from every generator, reference orders and candidates."""
    schedule = draw(st.sampled_from(SCHEDULES))
    ranks = draw(st.integers(1, most_ranks // 2)) * 2
    f, i, w = draw(seconds), draw(seconds), draw(seconds)
    pair = draw(st.floats(max(f, i + w), f + i + w))
    costs = CostModel(f, i, w, pair, comm=draw(st.sampled_from([0.0, 0.1, 0.5])))
    stages = draw(st.sampled_from([None, 1, 3])) if KNOWN[schedule].with_stages else None
    costs = costs.for_placement(placement_of(schedule, ranks, stages))
    micros, optimize, split = draw(st.integers(1, most_micros)), draw(st.booleans()), draw(st.booleans())
    return make_plan(schedule, ranks, micros, costs, optimize, split_backward=split, stages_per_rank=stages), costs


@given(plans())
def test_generated_plans_are_sound(found):
    plan, costs = found
    check_plan(plan)
    lowered = lower(plan)
    verify(lowered)
    check_columns(plan)
    check_columns(lowered)
    assert simulate(plan, costs).makespan >= plan_bound(plan, costs) * (1 - 1e-9)
    placement = plan.placement
    known = known_schedule(plan.schedule, placement.stages_per_rank)
    assert max(peak_activations(plan)) <= known.default_cap(placement.num_ranks)
    assert Plan.from_json(lowered.to_json()).digest() == lowered.digest()
    assert Plan.from_csv(lowered.to_csv()).programs == lowered.programs


@st.composite
def mutations(draw):
    """A lowered plan, and the same with one to three ops deleted, doubled, swapped, moved or renamed."""
    plan = lower(draw(plans(4, 6))[0])
    programs = [list(program) for program in plan.programs]
    for _ in range(draw(st.integers(1, 3))):
        program = draw(st.sampled_from([each for each in programs if each]))
        index = draw(st.integers(0, len(program) - 1))
        other = draw(st.integers(0, len(program) - 1))
        kind = draw(st.sampled_from(["delete", "double", "swap", "move", "rank", "micro"]))
        if kind == "delete":
            del program[index]
        elif kind == "double":
            program.insert(other, program[index])
        elif kind == "swap":
            program[index], program[other] = program[other], program[index]
        elif kind == "move":
            program.insert(other, program.pop(index))
        elif kind == "rank":
            draw(st.sampled_from(programs)).append(program.pop(index))
        elif not program[index].parts:
            op = program[index]
            program[index] = Op(op.kind, op.stage, draw(st.integers(0, plan.num_micro)))
        assume(all(programs))
    return plan, Plan(plan.placement, plan.num_micro, tuple(map(tuple, programs)), plan.schedule)


@given(mutations())
def test_the_verifier_refuses_what_is_unsound(found):
    plan, mutated = found
    assume(mutated.programs != plan.programs)
    try:
        verify(mutated)
    except VerifyError as error:
        assert "rank" in str(error)
    else:
        assert is_sound(mutated, lowered=True)
