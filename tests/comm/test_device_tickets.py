"""On a device the wait for a transfer orders streams: the host neither waits nor gives a time limit."""

from __future__ import annotations

from pathlib import Path

import fake_device
import pytest


@pytest.mark.parametrize("way", ["prebuilt", "python"])
def test_waits_order_streams(way):
    if way == "prebuilt":
        pytest.importorskip("dualpipe_engine._comm", reason="installed without the helper")
    found = fake_device.run_alone(Path(__file__).parent / "device_tickets.py", way)
    for kind, waits, tensors in (("send", 2, 1), ("recv", 2, 1), ("all_to_all", 3, 2), ("ready", 3, 2)):
        ticket = found[kind]
        # Once for each of the two waits, and once by the communication stream, which follows exchanges to time them.
        assert len(ticket["waits"]) == waits
        assert all(limit <= 0 for limit in ticket["waits"]), "a wait with a time limit holds the host"
        assert ticket["done"] is False, "what the device has not finished is not done"
        assert ticket["kept"] == [tensors, 0], "tensors live until the stream that posted them waits"
        assert ticket["moments"] == [True] * 4 and ticket["logged"]
