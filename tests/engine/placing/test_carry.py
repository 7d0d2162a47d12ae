"""Layers travel through host memory where the backend sends from nowhere else, and arrive on the device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dualpipe_engine.engine.placing import carry


@pytest.mark.parametrize(("backend", "through"), [("gloo", "cpu"), ("mpi", "cpu"), ("nccl", "meta")])
def test_blocks_go_where_the_backend_takes_them(monkeypatch, backend, through):
    sent, received = [], []
    sizes = [3, 0, 5]
    message = carry._Message(b"", [], [(7, size) for size in sizes], {})
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "send", lambda tensor, peer: sent.append((tensor.device.type, len(tensor))))
    monkeypatch.setattr(dist, "recv", lambda tensor, peer: received.append((tensor.device.type, len(tensor))))
    device = torch.device("meta")
    carry._send([torch.zeros(size, dtype=torch.uint8) for size in sizes], 1, device)
    blocks = [torch.empty(0, dtype=torch.uint8, device=device) for _ in sizes]
    carry._receive(blocks, message, layer=7, peer=1)
    assert sent == received == [(through, 3), (through, 5)]
    assert [(block.device, len(block)) for block in blocks] == [(device, size) for size in sizes]
