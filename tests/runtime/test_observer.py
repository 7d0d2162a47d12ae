"""Observer: marks in order, NVTX ranges around ops only, and nothing left of a batch that went before."""

import pytest
import torch

from dualpipe_engine.comm.tickets import Transfer
from dualpipe_engine.errors import ProfileError
from dualpipe_engine.profiling.profiler import enable_profiling
from dualpipe_engine.runtime.observer import Observer
from dualpipe_engine.schedule.op import Op
from dualpipe_engine.schedule.records import FLUSH, OP, PHASE, RECEIVE, REDUCTION


@pytest.fixture
def observer():
    found = Observer(1, torch.device("cpu"))
    found.start_batch()
    return found


def test_marks_of_a_batch(observer):
    op, reduce = Op.parse("3F7"), Op.parse("3REDUCE")
    observer.waited(RECEIVE, op, observer.now())
    with observer.span(op):
        pass
    with observer.span(reduce):
        reduction = observer.reducing()
    reduction.stop()
    record = observer.end_batch([Transfer("send", 1.0, 0.5, 3.0)]).resolve()  # of a user's phase of that name
    marks = [(mark.kind, str(mark.op)) for mark in record.marks[:4]]
    assert marks == [(RECEIVE, "3F7"), (OP, "3F7"), (OP, "3REDUCE"), (REDUCTION, "3REDUCE")]
    assert [mark.kind for mark in record.marks[4:]] == [PHASE]
    assert record.marks[4][2:] == (1.0, 3.0, "send", 0.5)
    times = [time for mark in record.marks[:3] for time in (mark.start, mark.end)]
    assert [record.start, *times, record.end] == sorted([record.start, *times, record.end])
    assert [str(span.op) for span in observer.spans()] == ["3F7", "3REDUCE"]
    assert {span.rank for span in observer.spans()} == {1}
    observer.start_batch()
    assert observer.spans() == []


def test_ops_are_nvtx_ranges_when_asked(observer, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    with observer.span(Op.parse("3F7")):
        pass
    assert calls == []
    observer.nvtx = True
    with observer.span(Op.parse("3F7")):
        calls.append("body")
    with observer.waiting(FLUSH):
        pass
    assert calls == ["dualpipe 3F7", "body", "pop"]


def test_at_least_one_step_is_kept():
    with pytest.raises(ProfileError, match="steps=0"):
        enable_profiling(steps=0)
