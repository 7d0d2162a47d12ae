"""What "auto" counts for a rank's state, on pooled ranks."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist

from dualpipe_engine.engine.auto import choose
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, Placement


def states(zero, device="cuda", replicas=4):
    """Of one of two stages with 100 parameters, and 10 of experts that two ranks share."""
    plain, expert = torch.nn.Parameter(torch.empty(100)), torch.nn.Parameter(torch.empty(10))
    expert.allreduce, expert.group_name = False, "ep_size_2"
    choose.get_accelerator = lambda: SimpleNamespace(device_name=lambda: device, available_memory=lambda: 1000)
    placements = [Placement(LINEAR, 2), Placement(BIDIRECTIONAL, 2)]
    place = SimpleNamespace(pipeline=[0, 1], rank=dist.get_rank(), replicas=replicas)
    settings = {"zero_optimization": zero}
    return choose._memory(settings, place, [plain, expert], torch.float32, placements)


def each(cases):
    before = choose.get_accelerator
    try:
        return [states(**case) for case in cases]
    finally:
        choose.get_accelerator = before
