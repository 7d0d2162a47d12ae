"""Times of transfers and reductions are those of the device, not of the host that queues them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

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
