"""Bytes of tensors that a rank holds while layers go to other ranks."""

from __future__ import annotations

import gc
from unittest.mock import patch

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

WIDTH, LAYERS = 16, 16


class Wide(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def bytes_of(params):
    return sum(param.numel() * param.itemsize for param in params)


def alive():
    """Bytes of all tensors that Python knows, memory that several share counted once."""
    found = (each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter))
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}.values())


def held_while_placing(placements):
    return [_held_while_placing(placement) for placement in placements]


def _held_while_placing(placement):
    """Bytes of what this rank built, of what it holds in the end, of the largest layer; the most that was alive while
    layers moved, and what is alive after."""
    from dualpipe_engine.engine.placing.module import place
    from dualpipe_engine.schedule.placement import Placement

    ranks = torch.distributed.get_world_size()
    specs = [LayerSpec(Wide, 64 * (1 + number % 3)) for number in range(LAYERS)]
    largest = bytes_of(Wide(64 * 3).parameters())
    module = PipelineModule(specs, num_stages=ranks, partition_method="uniform")
    listed = list(module.parameters())  # as a program does that makes its optimizer later
    built = bytes_of(listed)
    gc.collect()
    other = alive() - built
    seen = []

    def counted(block, peer):
        seen.append(alive() - other)
        return receive(block, peer)

    receive = torch.distributed.recv
    target = Placement(placement, ranks)
    bounds = [stage * LAYERS // target.num_stages for stage in range(target.num_stages + 1)]
    with patch.object(torch.distributed, "recv", counted):
        place(module, target, bounds)
    gc.collect()
    assert listed
    return built, bytes_of(module.parameters()), largest, max(seen), alive() - other
