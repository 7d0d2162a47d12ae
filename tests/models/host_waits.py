"""What makes the host wait for the device in the forward and backward of blocks; run alone, prints a JSON."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import fake_device
import torch

from dualpipe_engine.comm import device
from dualpipe_engine.models import experts
from dualpipe_engine.models.block import DenseBlock, MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.models.dispatch import AllToAll
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of
from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install


class Two:
    """A group of two ranks."""

    def size(self):
        return 2

    def rank(self):
        return 0


class Mirror:
    """Two ranks that send each other the same: what goes out comes back."""

    def all_to_all(self, group, out, rows, receive, send, what, behind=True):
        out.copy_(rows)
        nothing = {"finished_at": lambda: None, "moments": lambda: None}
        return SimpleNamespace(wait=lambda timeout_s: None, done=lambda: True, **nothing)


def block_of(kind, **changes):
    config = MoEConfig(hidden=16, heads=2, head=8, rotary=4, kv_rank=8, experts=4, expert_inner=8, **changes)
    torch.manual_seed(0)
    if kind is DenseBlock:
        return fake_device.on_device(kind(config))
    block = kind(config)
    if config.expert_parallel > 1:
        block.dispatcher, side = AllToAll(Two(), config.experts), device.Side(fake_device.Stream())
        block.dispatcher._stream = SimpleNamespace(posts=Mirror(), counts=Mirror(), side=side)
    return fake_device.on_device(block)


def count(block, phased, with_loss=False):
    """Names of the waits of one forward and backward."""
    x = fake_device.Tensor(torch.randn(2, 3, 16)).requires_grad_()
    inputs = (x, fake_device.Tensor(torch.zeros(1)).requires_grad_()) if with_loss else x
    grads = [fake_device.Tensor(torch.ones(2, 3, 16))] + [fake_device.Tensor(torch.ones(1))] * with_loss
    fake_device.waits.clear()
    if phased:
        store = DeferredWeightGrads()
        install(block, store)
        chunk = PhasedChunk(block, 0, phases_of([block]), 60.0, is_last=False, store=store)
        chunk.forward(0, inputs)
        chunk.input_backward(0, grads)
        chunk.weight_backward(0)
    else:
        out = block(inputs)
        torch.autograd.backward(out, grads if with_loss else grads[0])
    assert block.norm1.weight.grad is not None
    return list(fake_device.waits)


def main():
    library = fake_device.setup()
    device.on_stream, device.pinned_empty = (lambda stream: nullcontext()), fake_device.pinned_empty
    tensor = fake_device.Tensor(torch.arange(4))
    found = {}
    for name, read in {
        "tolist": tensor.tolist,
        "item": tensor.sum().item,
        "nonzero": tensor.nonzero,
        "bincount": tensor.bincount,
        "cpu": tensor.cpu,
        "upload": lambda: torch.empty_like(tensor).copy_(torch.arange(4)),
        "mask": lambda: tensor[tensor > 1],
        "repeat": lambda: tensor.repeat_interleave(tensor),
    }.items():
        fake_device.waits.clear()
        read()
        found[f"seen: {name}"] = list(fake_device.waits)
    for grouped in (False, True):
        experts.has_grouped_mm = lambda rows, weight, grouped=grouped: grouped
        for phased in (False, True):
            how = f"{'grouped' if grouped else 'single'}, {'phased' if phased else 'plain'}"
            found[f"dense, {how}"] = count(block_of(DenseBlock), phased)
            found[f"shared, {how}"] = count(block_of(MoEBlock, expert_parallel=2), phased)
            found[f"loss, {how}"] = count(block_of(MoEBlock, expert_parallel=2, balancing="loss"), phased, True)
            found[f"alone, {how}"] = count(block_of(MoEBlock), phased)
    del library
    fake_device.answer(found)


if __name__ == "__main__":
    main()
