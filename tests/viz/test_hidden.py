"""The overlap report and the tracks of measured transfers."""

from __future__ import annotations

import json

import pytest

from dualpipe_engine.schedule.op import Op
from dualpipe_engine.schedule.timeline import Hop, Span, Timeline
from dualpipe_engine.viz.chrome import read_chrome, to_chrome, write_chrome
from dualpipe_engine.viz.overlap import hidden, notes

HOPS = [
    Hop(0, "dispatch", 1.0, 3.0, 0.5, 2**20),
    Hop(1, "dispatch", 1.0, 3.0, 0.5, 2**20),
    Hop(0, "send", 2.0, 2.5, 9.0, 8),
    Hop(0, "combine", 2.5, 2.5, 0.0, 0),
]


def test_transfers_add_up_by_name():
    dispatch, send, combine = hidden(HOPS)
    assert (dispatch.name, dispatch.count, dispatch.size) == ("dispatch", 2, 2**21)
    assert dispatch.share == pytest.approx(0.75)
    assert send.share == 0.0, "what is waited for after the end hides nothing"
    assert combine.share == 1.0
    assert str(dispatch) == "75.0% of 4000 ms hidden, 1000 ms waited (2 transfers, 2.0 MiB)"


def test_measured_transfers_have_tracks_of_their_own(tmp_path):
    timeline = Timeline(2, [Span(0, Op.parse("0F0"), 1.5, 2.0), Span(1, Op.parse("1F0"), 2.0, 3.0)])
    events = [event for event in to_chrome(timeline, notes=notes(HOPS))["traceEvents"] if event["ph"] == "X"]
    tracks = {(event["pid"], event["name"]): event["tid"] for event in events}
    assert tracks[0, "dispatch"] == tracks[1, "dispatch"] == 2 and tracks[0, "send"] == 3
    assert min(event["ts"] for event in events) == 0, "the first transfer begins before the first op"
    (dispatch,) = [event for event in events if (event["pid"], event["name"]) == (0, "dispatch")]
    assert dispatch["args"] == {"waited": 0.5, "bytes": 2**20} and dispatch["dur"] == 2e6
    write_chrome(tmp_path / "trace.json", timeline, notes=notes(HOPS))
    json.loads((tmp_path / "trace.json").read_text())
    assert [str(span.op) for span in read_chrome(tmp_path / "trace.json").spans] == ["0F0", "1F0"]
