"""Random states that are put back are those of this rank alone; some layers are not cut apart."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dualpipe_engine.engine.placing import partition
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, VEE, Placement


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


@pytest.mark.parametrize(
    ("name", "bounds", "kept"),
    [
        (BIDIRECTIONAL, [0, 2, 3, 5, 8], [0, 2, 3, 4, 8]),
        (BIDIRECTIONAL, [0, 2, 4, 7, 8], [0, 2, 3, 4, 8]),  # the stages before make room
        (BIDIRECTIONAL, [0, 2, 3, 4, 8], [0, 2, 3, 4, 8]),
        (VEE, [0, 2, 5, 6, 8], [0, 2, 3, 4, 8]),
        (LINEAR, [0, 2, 3, 5, 8], [0, 2, 3, 5, 8]),
    ],
)
def test_layers_that_want_the_next_one_are_not_cut_off(name, bounds, kept):
    layers = [SimpleNamespace(with_next=number in (4, 5, 6)) for number in range(8)]
    placement = Placement(name, 2 if name == VEE else 4)
    assert partition.kept_together(bounds, layers, placement) == kept


def test_too_few_layers_are_cut_as_they_were():
    layers = [SimpleNamespace(with_next=number > 1) for number in range(5)]
    assert partition.kept_together([0, 1, 2, 3, 5], layers, Placement(BIDIRECTIONAL, 4)) == [0, 1, 2, 3, 5]
