"""Times of transfers and reductions are those of the device, not of the host that queues them."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from dualpipe_engine.comm.copies import ThreadCopyist
from dualpipe_engine.engine.auto import link_probe as links


def test_on_an_accelerator_events_are_read(monkeypatch):
    """The first run, which warms up, is left out; nothing waits for the device in between."""
    now, runs = [7.0], []

    class Event:
        def __init__(self, device, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            assert not runs

        def elapsed_time(self, later):
            return 1e3 * (later.at - self.at)

    def synchronize():
        assert len(runs) in (0, links.REPEATS + 1)

    def action():
        runs.append(1)
        now[0] += 0.25 if len(runs) > 1 else 60.0

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch, "accelerator", SimpleNamespace(synchronize=synchronize))
    assert links._timed(action, torch.device("meta")) == pytest.approx(0.25)
    assert len(runs) == links.REPEATS + 1


@pytest.mark.parametrize("late", ["offload", "reload"])
def test_a_copy_takes_as_long_as_the_slower_way(ranks, late):
    """Of two ways the slower one counts, for all bytes though fewer are copied."""
    [(seconds, other, names)] = ranks.run(1, copies, late=late)
    assert seconds >= 2 * LATE_S and other == 0
    assert names == ["offload"] * (links.REPEATS + 1) + ["reload"] * (links.REPEATS + 1)


LATE_S = 0.1


def copies(late):
    """Seconds of a copy of 1024 bytes when those of one name are late, and of one of none; and the copies made."""
    names = []

    class Late(ThreadCopyist):
        def copy(self, name, pairs):
            names.append(name)
            copying = super().copy(name, pairs)
            if name == late:
                time.sleep(LATE_S)
            return copying

    device, before = torch.device("cpu"), (links.copyist, links.LARGEST_COPY)
    links.LARGEST_COPY = 512
    other = links.copy_seconds(0, device, 60.0)
    links.copyist = lambda device: Late()
    try:
        return links.copy_seconds(1024, device, 60.0), other, names
    finally:
        links.copyist, links.LARGEST_COPY = before
