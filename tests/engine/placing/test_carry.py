"""Layers travel through host memory where the backend sends from nowhere else, and arrive on the device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dualpipe_engine.engine.placing import carry


@pytest.mark.parametrize(("backend", "through"), [("gloo", "cpu"), ("mpi", "cpu"), ("nccl", "meta")])
def test_blocks_go_where_the_backend_takes_them(monkeypatch, backend, through):
    sent, received = [], []
    message = carry._Message(b"", [], [3, 0, 5], {})
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "send_object_list", lambda box, peer: None)
    monkeypatch.setattr(dist, "recv_object_list", lambda box, peer: box.__setitem__(0, message))
    monkeypatch.setattr(dist, "send", lambda tensor, peer: sent.append((tensor.device.type, len(tensor))))
    monkeypatch.setattr(dist, "recv", lambda tensor, peer: received.append((tensor.device.type, len(tensor))))
    device = torch.device("meta")
    carry._send(message, [torch.zeros(size, dtype=torch.uint8) for size in message.sizes], 1, device)
    _, blocks = carry._received(1, device)
    assert sent == received == [(through, 3), (through, 5)]
    assert [(block.device, len(block)) for block in blocks] == [(device, 3), (device, 0), (device, 5)]
