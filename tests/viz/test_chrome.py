"""Chrome traces: the round trip, tracks that never overlap, and files that are none."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import COMM, Op
from dualpipe_engine.schedule.timeline import Span, Timeline
from dualpipe_engine.viz.chrome import COMM_TRACK, Note, read_chrome, to_chrome, write_chrome

TEXTS = ["0F0", "1I3", "1W3", "(0F14;7B7)FB", "0SEND_F0", "0RECV_B1", "1SEND_B2", "2REDUCE", "STEP"]
TIMES = st.floats(0, 50, allow_nan=False)
SPANS = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(TEXTS), TIMES, TIMES), min_size=1, max_size=30)


def timeline_of(rows):
    spans = [Span(rank, Op.parse(text), start, start + length) for rank, text, start, length in rows]
    return Timeline(4, sorted(spans, key=lambda span: (span.rank, span.start, span.end)))


@settings(max_examples=50, deadline=None)
@given(SPANS)
def test_what_is_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    timeline = timeline_of(rows)
    write_chrome(path, timeline)
    found = read_chrome(path)
    begin = min(span.start for span in timeline.spans)
    assert found.num_ranks == 4
    assert sorted((s.rank, str(s.op)) for s in found.spans) == sorted((s.rank, str(s.op)) for s in timeline.spans)
    for key in ("start", "end"):
        expected = sorted((s.rank, getattr(s, key) - begin) for s in timeline.spans)
        measured = sorted((s.rank, getattr(s, key)) for s in found.spans)
        assert [t for _, t in measured] == pytest.approx([t for _, t in expected], abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(SPANS)
def test_transfers_of_one_track_do_not_overlap(rows):
    timeline = timeline_of(rows)
    tracks = {}
    for event in to_chrome(timeline)["traceEvents"]:
        if event["ph"] == "X" and event["cat"] in COMM:
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        spans.sort()
        assert all(left[1] <= right[0] + 1e-6 for left, right in pairwise(spans))


def test_each_rank_is_a_process_with_named_tracks():
    trace = to_chrome(timeline_of([(1, "0F0", 0, 2), (1, "0SEND_F0", 1, 3), (1, "2REDUCE", 5, 1)]))
    names = {(e["pid"], e.get("tid"), e["args"].get("name")) for e in trace["traceEvents"] if e["ph"] == "M"}
    assert {(0, None, "rank 0"), (3, None, "rank 3")} <= names
    assert {(1, 0, "compute"), (1, 1, "reduction"), (1, 2, "communication 1")} <= names
    tracks = {e["name"]: (e["pid"], e["tid"]) for e in trace["traceEvents"] if e["ph"] == "X"}
    assert tracks == {"0F0": (1, 0), "0SEND_F0": (1, 2), "2REDUCE": (1, 1)}
    event = next(e for e in trace["traceEvents"] if e["name"] == "0SEND_F0")
    assert (event["ts"], event["dur"]) == (1e6, 3e6)
    assert event["args"] == {"op": "0SEND_F0", "stage": 0, "micro_batch": 0}


def test_a_bare_list_and_foreign_events_are_read(tmp_path):
    path = tmp_path / "trace.json"
    events = to_chrome(timeline_of([(2, "0F0", 0, 2)]))["traceEvents"]
    path.write_text(json.dumps([*events, {"ph": "X", "pid": 77, "name": "aten::mm", "ts": 0, "dur": 1}]))
    timeline = read_chrome(path)
    assert timeline.num_ranks == 3
    assert timeline.spans == [Span(2, Op("F", 0, 0), 0.0, 2.0)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("3", "traceEvents"),
        ('{"programs": []}', "traceEvents"),
        ('{"traceEvents": []}', "no event"),
        ('{"traceEvents": [4]}', "malformed"),
        ('[{"ph": "X", "pid": 0, "ts": 0, "dur": 1, "args": {"op": "7Q1"}}]', "7Q1"),
        ('[{"ph": "X", "pid": 0, "ts": "0", "dur": 1, "args": {"op": "7F1"}}]', "malformed"),
        ('[{"ph": "X", "pid": -1, "ts": 0, "dur": 1, "args": {"op": "7F1"}}]', "process -1"),
        ('[{"ph": "X", "pid": 0, "ts": 0, "args": {"op": "7F1"}}]', "dur"),
    ],
)
def test_files_that_are_no_trace_are_named(tmp_path, text, reason):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=reason) as caught:
        read_chrome(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlanError, match="nowhere"):
        read_chrome(tmp_path / "nowhere.json")


def test_notes_are_shown_and_not_read(tmp_path):
    path = tmp_path / "trace.json"
    timeline = timeline_of([(1, "0F0", 0, 2)])
    notes = [Note(1, COMM_TRACK, "dispatch", "phase", 0.5, 1.5, {"waited_us": 3}), Note(5, 0, "0F0", "F", -1.0, 0.0)]
    path.write_text(json.dumps(to_chrome(timeline, "", notes, {5: "replica 1 rank 1"})))
    events = {e["name"]: e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X" and e["pid"] == 1}
    assert (events["dispatch"]["tid"], events["dispatch"]["ts"], events["dispatch"]["dur"]) == (2, 1.5e6, 1e6)
    assert events["dispatch"]["args"] == {"waited_us": 3}
    assert read_chrome(path).spans == [Span(1, Op("F", 0, 0), 1.0, 3.0)]
