import random

import pytest
from plan_checks import check_plan

from dualpipe_engine.schedule.op import B, F, I
from dualpipe_engine.schedule.orders.blocks import block, widths
from dualpipe_engine.schedule.passes.squeeze import Squeezer, Way
from dualpipe_engine.schedule.timing.costs import UNIT, CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate


def test_what_comes_out_is_what_the_simulator_finds() -> None:
    """The makespan to the last bit, each op once, within the cap; the order of the micro-batches stays."""
    draw = random.Random(5)
    for _ in range(40):
        ranks, micros = draw.randint(1, 6), draw.randint(1, 10)
        costs = CostModel(
            *(tuple(draw.uniform(0.2, 2) for _ in range(2 * ranks)) for _ in range(3)), comm=draw.choice([0.0, 0.2])
        )
        found = block(ranks, draw.choice(widths(ranks)))
        cap = found.peak(micros) + draw.randint(0, 3)
        way = Way(draw.random() < 0.7, draw.choice([0.0, 0.5, 1.0]))
        split = draw.random() < 0.7
        squeezed = Squeezer(found.plan(micros), costs, split).run(cap, way)
        assert squeezed is not None
        check_plan(squeezed.plan)
        assert squeezed.makespan == simulate(squeezed.plan, costs).makespan
        assert max(peak_activations(squeezed.plan)) <= cap
        for program in squeezed.plan.programs:
            kinds = {op.kind for op in program}
            assert kinds == ({F, I, "W"} if split else {F, B})


def test_idle_time_is_filled_from_further_down() -> None:
    """Rank 0 of V-Min's order waits for its second stage; with room for more activations it runs forwards there."""
    order = Squeezer(block(8, 0).plan(32), UNIT)
    makespans = [order.run(cap).makespan for cap in (8, 12, 16)]
    assert makespans[0] > makespans[1] > makespans[2]
    kept = order.run(16, Way(pull=False))
    assert max(peak_activations(kept.plan)) < 16 and kept.makespan > makespans[2]


def test_a_limit_ends_the_run() -> None:
    order = Squeezer(block(4, 2).plan(9), UNIT)
    makespan = order.run(6).makespan
    assert order.run(6, limit=makespan).makespan == makespan
    assert order.run(6, limit=makespan - 1) is None


def test_costs_of_other_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="4 numbers, but there are 8 stages"):
        Squeezer(block(4, 0).plan(2), CostModel(f=(1.0,) * 4))
