"""No rank holds more than its stages and one layer while layers move."""

from __future__ import annotations

from collections import Counter

import moves_runs
from hypothesis import given
from hypothesis import strategies as st

from dualpipe_engine.engine.placing.moves import leaving, moves_between, ordered
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, VEE, Placement


@given(st.data())
def test_room_is_made_before_a_layer_comes(data):
    ranks = 2 * data.draw(st.integers(1, 4))
    placement = Placement(data.draw(st.sampled_from([LINEAR, BIDIRECTIONAL, VEE])), ranks)
    layers = data.draw(st.integers(placement.num_stages, 3 * placement.num_stages))

    def cuts(parts):
        inner = data.draw(st.sets(st.integers(1, layers - 1), min_size=parts - 1, max_size=parts - 1))
        return [0, *sorted(inner), layers]

    before, after = cuts(ranks), cuts(placement.num_stages)
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=layers, max_size=layers))
    moves = moves_between(placement, before, after)
    leaves = leaving(placement, before, after)
    holds = [set(range(before[rank], before[rank + 1])) for rank in range(ranks)]
    shall = [
        {layer for stage in placement.stages_of(rank) for layer in range(after[stage], after[stage + 1])}
        for rank in range(ranks)
    ]

    def weigh(held):
        return sum(sizes[layer] for layer in held)

    room = [max(weigh(holds[rank]), weigh(shall[rank]) + max(sizes)) for rank in range(ranks)]
    for layer, source, target, left in ordered(moves, dict(enumerate(sizes)), leaves):
        assert layer in holds[source]
        holds[target].add(layer)
        assert weigh(holds[target]) <= room[target]
        if left:
            holds[source].remove(layer)
    assert holds == shall


def test_pairs_of_ranks_move_beside_each_other():
    """16 ranks of DualPipeV: in the time of one rank's transfers, not of all."""
    placement = Placement(VEE, 16)
    before, after = [4 * rank for rank in range(17)], [2 * stage for stage in range(33)]
    moves = moves_between(placement, before, after)
    free = Counter()
    for _, source, target, _ in ordered(moves, dict.fromkeys(range(64), 1), leaving(placement, before, after)):
        free[source] = free[target] = max(free[source], free[target]) + 1
    busy = Counter(rank for move in moves for rank in (move.source, move.target))
    assert max(free.values()) <= 2 * max(busy.values())


def test_a_rank_holds_its_stages_and_one_layer(ranks):
    for rank in ranks.run(4, moves_runs.held_while_placing, placements=[VEE, BIDIRECTIONAL]):
        for built, stages, layer, most, after in rank:
            assert most <= max(built, stages + layer) + 2048
            assert after <= stages + 2048
