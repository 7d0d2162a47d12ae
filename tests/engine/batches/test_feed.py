"""Feeding: on an accelerator micro-batches are copied ahead, from pinned memory, on a stream of their own."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dualpipe_engine.comm import device
from dualpipe_engine.comm.device import InTurn, Side
from dualpipe_engine.engine.batches.feed import BatchFeed
from dualpipe_engine.schedule.search.make_plan import make_plan

MICROS = 6


class Stream:
    """Counts what it copies, and hands out the number as the event."""

    def __init__(self):
        self.copied = 0

    def record_event(self):
        self.copied += 1
        return self.copied


def feed_of(schedule, rank, side, read):
    placement = make_plan(schedule, 2, MICROS).placement
    place = SimpleNamespace(placement=placement, rank=rank, feeds=True)
    batches = iter([(torch.full((2,), float(micro)), torch.full((1,), -float(micro))) for micro in range(MICROS)])

    def next_batch():
        read.append(len(read))
        return next(batches)

    return BatchFeed(place, MICROS, next_batch, torch.device("cpu"), side=side)


@pytest.fixture
def events(monkeypatch):
    """What happens to tensors that an accelerator takes."""
    found = []
    current = SimpleNamespace(wait_event=lambda event: found.append(f"wait {event}"))
    monkeypatch.setattr(device, "on_stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: found.append("used"))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: found.append("pin") or tensor.clone())
    return found


@pytest.mark.parametrize(("schedule", "ahead"), [("1f1b", 1), ("dualpipe", 2)])
def test_the_next_micro_batch_travels_while_one_is_computed(events, schedule, ahead):
    read, stream = [], Stream()
    feed = feed_of(schedule, 0, Side(stream), read)
    assert feed.inputs(0).tolist() == [0.0, 0.0]
    assert len(read) == 1 + ahead, "the next ones of this end have been read, and no more"
    assert events.count("pin") == stream.copied >= 2, "each copy starts in pinned memory"
    assert [event for event in events if event != "pin"] == ["wait 1", "used"], "the first copy alone is waited for"
    events.clear()
    assert feed.inputs(ahead).tolist() == [float(ahead)] * 2
    assert sum(event.startswith("wait") for event in events) == 1
    for micro in range(2 * ahead, MICROS, ahead):
        assert feed.inputs(micro).tolist() == [float(micro)] * 2
    assert len(read) == MICROS


def test_on_the_cpu_nothing_is_read_ahead():
    read = []
    feed = feed_of("1f1b", 0, InTurn(), read)
    assert feed.inputs(0).tolist() == [0.0, 0.0] and read == [0]
    assert feed.inputs(1).tolist() == [1.0, 1.0] and read == [0, 1]
