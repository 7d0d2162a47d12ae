"""Blocks let the host run ahead: at most one wait for the device in a MoE block, forward and backward together."""

from __future__ import annotations

from pathlib import Path

import fake_device
import pytest


@pytest.fixture(scope="module")
def found():
    return fake_device.run_alone(Path(__file__).parent / "host_waits.py")


def test_what_waits_is_seen(found):
    seen = {name: waits for name, waits in found.items() if name.startswith("seen: ")}
    assert len(seen) == 8 and all(seen.values()), seen


def test_a_block_waits_at_most_once(found):
    for name, waits in found.items():
        if name.startswith("dense, ") or (name.startswith("alone, ") and "grouped" in name):
            assert waits == [], name
        elif name.startswith(("shared, ", "loss, ")):
            assert waits == ["event"], name  # the sizes, from pinned memory
        elif name.startswith("alone, "):
            assert len(waits) == 1, name  # without a product of groups somebody has to know their sizes
    assert len(found) == 24
