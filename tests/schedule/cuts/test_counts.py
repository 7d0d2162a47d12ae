"""Layers of each stage as text: what is read, and one sentence for what does not fit."""

import pytest

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.cuts.counts import bounds_of_counts, parse_counts
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, VEE, Placement


@pytest.mark.parametrize(
    ("text", "counts"),
    [("6,6,5,5", (6, 6, 5, 5)), (" 1 , 2", (1, 2)), ("7", (7,)), ("pairs", None), ("type:6", None), ("1,", None)],
)
def test_text(text, counts):
    assert parse_counts(text) == counts
    assert parse_counts(None) is None


def test_bounds():
    assert bounds_of_counts((6, 6, 5, 5), 22, Placement(BIDIRECTIONAL, 4)) == (0, 6, 12, 17, 22)
    assert bounds_of_counts((1, 2, 3, 4), 10, Placement(VEE, 2)) == (0, 1, 3, 6, 10)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((5, 5), "5,5 is for 2 stages, but the schedule has 4, 2 a rank: give 4 numbers"),
        ((1, 2, 3, 5), "for 11 layers, but the model has 10"),
        ((5, 0, 2, 3), "leaves stage 1 without layers"),
    ],
)
def test_what_does_not_fit(counts, said):
    with pytest.raises(ConfigError, match=said):
        bounds_of_counts(counts, 10, Placement(VEE, 2))
