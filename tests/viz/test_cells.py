"""Cells: labels, whole columns and the reduction of time to columns."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_engine.schedule.op import Op
from dualpipe_engine.schedule.timeline import Span, Timeline
from dualpipe_engine.viz.cells import cells_of, columns, headline, label, quantum

GAPS_AND_LENGTHS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=12)


def timeline_of(rows):
    """A timeline of forwards from (gap, length) pairs for each rank, starting at time 100."""
    spans = []
    for rank, row in enumerate(rows):
        now = 100
        for micro, (gap, length) in enumerate(row):
            spans.append(Span(rank, Op("F", rank, micro), now + gap, now + gap + length))
            now += gap + length
    return Timeline(len(rows), spans)


@settings(max_examples=60, deadline=None)
@given(st.lists(GAPS_AND_LENGTHS, min_size=1, max_size=3), st.integers(1, 4))
def test_columns_show_what_fills_most_of_them(rows, width):
    timeline = timeline_of(rows)
    begin = min(span.start for span in timeline.spans)
    count = -(-timeline.makespan // width)
    for rank, owners in enumerate(columns(timeline, width, count)):
        for column, owner in enumerate(owners):
            steps = [begin + column * width + step + 0.5 for step in range(width)]  # majority of whole time steps
            inside = [
                next((i for i, s in enumerate(timeline.spans) if s.rank == rank and s.start < t < s.end), None)
                for t in steps
            ]
            votes = Counter(inside)
            idle = votes.pop(None, 0)
            if owner is None:
                assert idle > width / 2
            else:
                assert idle <= width / 2
                assert votes[owner] == max(votes.values())


def test_columns_leave_transfers_out():
    timeline = Timeline(1, [Span(0, Op("SEND_F", 0, 0), 0, 4), Span(0, Op("F", 0, 1), 2, 3)])
    assert columns(timeline, 1, 4) == [[None, None, 1, None]]


@pytest.mark.parametrize("text", ["0F0", "3F12", "3B12", "(0F14;7B7)FB", "(7F14;0B7)FB", "2REDUCE", "STEP"])
def test_labels_fit_and_grow_with_the_room(text):
    op = Op.parse(text)
    found = [label(op, 0, width) for width in range(1, 12)]
    assert all(1 <= len(content) <= width for width, content in enumerate(found, 1))
    assert sorted(found, key=len) == found


def test_lower_case_marks_the_second_stage_of_the_rank():
    assert label(Op.parse("(0F14;7B7)FB"), 0, 9) == "F14&b7"
    assert label(Op.parse("(0F14;7B7)FB"), 7, 9) == "f14&B7"
    assert label(Op.parse("STEP"), 3, 9) == "S"


def test_a_pair_is_two_cells_without_a_gap_and_a_transfer_is_none():
    forward, backward = cells_of(Span(0, Op.parse("(0F14;7B7)FB"), 10.0, 13.0))
    assert (forward.kind, forward.micro, forward.second, forward.start, forward.end) == ("F", 14, False, 10, 11)
    assert (backward.kind, backward.micro, backward.second, backward.start, backward.end) == ("B", 7, True, 11, 13)
    assert cells_of(Span(0, Op("RECV_B", 0, 1), 0, 1)) == ()


def test_quantum_is_the_unit_of_simulated_durations_only():
    assert quantum(timeline_of([[(0, 2), (1, 4)], [(0, 6)]])) == 2
    assert quantum(timeline_of([[(0, 2), (1, 3)]])) is None
    assert quantum(Timeline(2, [])) is None


def test_headline_counts_the_largest_bubble():
    assert headline(timeline_of([[(0, 8)], [(0, 6)]]), "s") == "makespan 8 s, largest bubble 2 s (25%)"
