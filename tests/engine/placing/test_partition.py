"""Random states that are put back are those of this rank alone."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dualpipe_engine.engine.placing import partition


@pytest.mark.parametrize(("kind", "devices"), [("cuda", [3]), ("cpu", [])])
def test_devices_of_other_ranks_are_left_alone(monkeypatch, kind, devices):
    """All ranks of a machine see all of its devices; to ask for the state of one makes a context on it."""
    asked = []
    accelerator = SimpleNamespace(device_name=lambda: kind, current_device=lambda: 3)
    monkeypatch.setattr(partition, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **given: asked.append(given) or nullcontext())
    with partition.same_random_state():
        pass
    assert asked == [{"devices": devices, "device_type": "cuda"}]
