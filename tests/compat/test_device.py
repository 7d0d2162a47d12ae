"""The transport of DeepSeek's interface is made for the device that its modules are on."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe_engine.compat import deepseek


@pytest.mark.parametrize(("make", "ranks"), [(deepseek.DualPipe, 2), (deepseek.DualPipeV, 3)])
def test_transport_has_the_device_of_the_modules(monkeypatch, make, ranks):
    made = []

    class Transport:
        rank, ahead, whole = 0, None, False

        def __init__(self, *args, edges, **kwargs):
            made.append((args[3], edges))

    monkeypatch.setattr(deepseek, "transport_of", lambda group: Transport)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "get_global_rank", lambda group, rank: rank)
    pipe = make([nn.Linear(1, 1, device="meta") for _ in range(2)], process_group=object())
    assert made == [(torch.device("meta"), pipe._placement.edges())]
