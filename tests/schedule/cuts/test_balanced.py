"""Cuts: the least largest rank load (brute force), evenness, bounds, errors, a model too big for brute force."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.cuts.balanced import balance_pairs, balanced_cuts, equal_counts, rank_loads, stage_loads
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, VEE, Placement

PLACEMENTS = [Placement(LINEAR, n) for n in (1, 2, 3, 4)] + [Placement(VEE, n) for n in (1, 2, 3)]
PLACEMENTS += [Placement(BIDIRECTIONAL, n) for n in (2, 4, 6)]
TIMES = st.one_of(st.integers(0, 6), st.floats(0, 1), st.sampled_from([0, 0, 1e-3, 40.0]))


@st.composite
def layers_on_ranks(draw):
    placement = draw(st.sampled_from(PLACEMENTS))
    count = placement.num_stages + draw(st.integers(0, 5))
    return draw(st.lists(TIMES, min_size=count, max_size=count)), placement


def all_cuts(num_layers, num_stages):
    return ((0, *inner, num_layers) for inner in combinations(range(1, num_layers), num_stages - 1))


def largest(weights, bounds, placement):
    stages = [sum(weights[start:stop]) for start, stop in pairwise(bounds)]
    return max(sum(stages[s] for s in placement.stages_of(rank)) for rank in range(placement.num_ranks))


@settings(max_examples=150, deadline=None)
@given(layers_on_ranks())
def test_no_cut_has_a_smaller_largest_rank_load(case):
    weights, placement = case
    bounds = balance_pairs(weights, placement)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(weights), placement.num_stages + 1)
    assert all(start < stop for start, stop in pairwise(bounds))
    least = min(largest(weights, cut, placement) for cut in all_cuts(len(weights), placement.num_stages))
    assert largest(weights, bounds, placement) <= least + 2e-5 * sum(weights)


@settings(max_examples=60, deadline=None)
@given(layers_on_ranks())
def test_slack_bounds_the_rank_load_and_linear_cuts_are_even(case):
    weights, placement = case
    slacks = (0.0, 0.1, 1.0)
    tolerance = 2e-5 * sum(weights)
    cuts = balanced_cuts(weights, placement, slacks)
    least = largest(weights, cuts[0], placement)
    for slack, bounds in zip(slacks, cuts, strict=True):
        assert largest(weights, bounds, placement) <= least * (1 + slack) + tolerance
        if placement.name == LINEAR and sum(weights):
            allowed = least * (1 + slack) - tolerance
            others = (cut for cut in all_cuts(len(weights), placement.num_stages))
            others = [cut for cut in others if largest(weights, cut, placement) <= allowed]
            fewest = min((squares(weights, cut) for cut in others), default=squares(weights, bounds))
            assert squares(weights, bounds) <= fewest + 1e-4 * sum(weights) ** 2


def squares(weights, bounds):
    return sum(load * load for load in stage_loads(weights, bounds))


@pytest.mark.parametrize("placement", [Placement(BIDIRECTIONAL, 8), Placement(VEE, 4)])
def test_an_even_cut_is_found_where_there_is_one(placement):
    """Embedding + 0.2 F and head + 1 F on 160 blocks of F / 20: all stages, and so all ranks, can be equal."""
    weights = [0.25, *[0.05] * 158, 1.05]
    bounds = balance_pairs(weights, placement)
    assert stage_loads(weights, bounds) == pytest.approx([1.15] * 8)
    assert rank_loads(weights, bounds, placement) == pytest.approx([2.3] * placement.num_ranks)


def test_a_head_larger_than_a_stage_shares_its_rank_with_little():
    weights = [0.2, *[1.0] * 32, 6.0]
    placement = Placement(BIDIRECTIONAL, 8)
    loads = rank_loads(weights, balance_pairs(weights, placement), placement)
    assert max(loads) == 10  # 38.2 in blocks of 1 on 4 pairs of ranks
    alone = max(stage_loads(weights, balance_pairs(weights, Placement(LINEAR, 8))))
    assert alone == 6


@pytest.mark.parametrize("name", [LINEAR, BIDIRECTIONAL, VEE])
@pytest.mark.parametrize("heavy", [1.0, 30.0])
def test_many_layers(name, heavy):
    """256 layers on 32 ranks: no further from the mean than one layer, or a pair of the two ends."""
    placement = Placement(name, 32)
    weights = [0.2, *[1.0 + 0.001 * (index * 37 % 100) for index in range(254)], heavy]
    bounds = balance_pairs(weights, placement)
    mean = sum(weights) / placement.num_ranks * (2 if name == BIDIRECTIONAL else 1)
    assert max(rank_loads(weights, bounds, placement)) <= max(mean + 1.1, heavy + 0.2 + 1e-3)
    assert min(pair[1] - pair[0] for pair in pairwise(bounds)) >= 1


def test_equal_counts_and_layers_without_a_time():
    assert equal_counts(10, 4) == (0, 3, 6, 8, 10)
    assert balance_pairs([0.0] * 8, Placement(VEE, 2)) == (0, 2, 4, 6, 8)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_requests(bad):
    with pytest.raises(PlanError, match="finite"):
        balance_pairs([1.0, bad, 1.0], Placement(LINEAR, 2))
    for cut in (lambda: equal_counts(3, 4), lambda: balance_pairs([1.0] * 3, Placement(VEE, 2))):
        with pytest.raises(PlanError, match="3 layers cannot fill 4 stages"):
            cut()
