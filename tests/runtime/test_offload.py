"""Offload of one stage: what leaves and what stays, how much memory is left, and copies that are late."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dualpipe_engine.comm import copies
from dualpipe_engine.comm.copies import ThreadCopyist
from dualpipe_engine.errors import PipelineRuntimeError
from dualpipe_engine.runtime import offload
from dualpipe_engine.runtime.chunk import StageChunk
from dualpipe_engine.runtime.offload import Offload
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of
from dualpipe_engine.runtime.recompute import Recompute
from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install
from dualpipe_engine.schedule.op import OFFLOAD, Op

CPU = torch.device("cpu")
WIDTH, ROWS = 64, 256


class Made(TorchDispatchMode):
    """Remembers the storages that operations make, but those of a module, as long as they live."""

    def __init__(self, module):
        super().__init__()
        self._refs = []
        self._own = {param.data_ptr() for param in module.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._refs.append(weakref.ref(tensor.untyped_storage()))
        return out

    def bytes(self):
        gc.collect()
        alive = {s.data_ptr(): s.nbytes() for ref in self._refs if (s := ref()) is not None}
        return sum(size for place, size in alive.items() if place not in self._own)


def block():
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.2), nn.LayerNorm(WIDTH)
    )


def make(module, kind="whole", log=None, timeout=60.0, store=None, leaves=((1, 0),)):
    moved = Offload(module, CPU, timeout, log)
    moved.begin_batch([Op(OFFLOAD, *key) for key in leaves])
    options = {"is_last": False, "offload": moved, "store": store}
    if kind == "whole":
        return moved, StageChunk(module, 1, **options)
    return moved, PhasedChunk(module, 1, phases_of(list(module)), 60.0, **options)


def leaf():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def plain(module):
    torch.manual_seed(9)
    chunk = StageChunk(module, 1, is_last=False)
    out = chunk.forward(0, leaf())
    (back,) = chunk.backward(0, [torch.ones_like(out)])
    grads = [param.grad.clone() for param in module.parameters()]
    module.zero_grad()
    return [out, back, *grads]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ["whole", "phases"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_memory_falls_and_bits_stay(kind, split, recomputes):
    module = block()
    expected = plain(module)
    store = DeferredWeightGrads() if split else None
    if store is not None:
        install(module, store)
    log = []
    moved, chunk = make(module, kind, log, store=store)
    if recomputes:
        again = Recompute({"1": module[1]})
        again.install()
        if kind == "whole":
            chunk.module = again.within(module)
        else:
            chunk._phases = [phase._replace(run=again.within(phase.run)) for phase in chunk._phases]
    torch.manual_seed(9)
    with Made(module) as made:
        x = leaf()
        out = chunk.forward(0, x)
        kept = made.bytes()
        moved.leave(1, 0)
        moved.let_go(1, 0)
        away = made.bytes() - moved.host_bytes()
        assert moved.host_bytes() > 0.5 * kept
        # Left: the output, which somebody else holds here, and what is too small to leave.
        assert away <= out.nbytes + 3 * offload.LEAST < 0.5 * kept
        moved.bring_back(1, 0)
        moved.await_back(1, 0)
        assert moved.host_bytes() == 0
        (back,) = (chunk.input_backward if split else chunk.backward)(0, [torch.ones_like(out)])
        if split:
            chunk.weight_backward(0)
        del x
    assert same([out, back, *(param.grad for param in module.parameters())], expected)
    assert [transfer.name for transfer in log] == ["offload", "reload"]
    assert log[0].size == log[1].size and all(t.posted <= t.finished for t in log)
    assert not moved._saved and not moved._copies


def copied(moved):
    """Bytes of each storage that a forward has saved to leave."""
    return sorted(stored.there.nbytes for stored in moved._of(1, 0))


class Saving(nn.Module):
    """Saves a weight, views of one memory, a small tensor, and what another micro-batch saves too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.shared = torch.randn(128, WIDTH)

    def forward(self, x):
        x = x @ self.weight.t()  # the input, and a view of the weight
        wide = x.repeat(1, 2).sin()  # one memory, two views of which are saved
        left, right = wide[:, :WIDTH], wide[:, WIDTH:]
        small = x[:1] * x[1:2].exp()
        return left * right * self.shared + small


def test_what_leaves():
    module = Saving()
    moved, chunk = make(module, leaves=((1, 0), (1, 1)))
    x = torch.randn(128, WIDTH)
    chunk.forward(0, x.clone().requires_grad_())
    big = 128 * WIDTH * 4
    # The input of the product, that of sin, the memory of both views, their product, and what nobody has saved before.
    assert copied(moved) == [big] * 3 + [2 * big] * 2
    chunk.forward(1, x.clone().requires_grad_())
    sizes = sorted(stored.there.nbytes for stored in moved._of(1, 1))
    assert sizes == [big] * 2 + [2 * big] * 2, "what the first micro-batch has saved too stays"


def test_others_are_left_alone():
    moved, chunk = make(block(), leaves=((1, 5),))
    out = chunk.forward(0, leaf())
    moved.leave(1, 0)
    moved.await_back(1, 0)
    assert not moved._saved and not moved._copies
    chunk.backward(0, [torch.ones_like(out)])


def test_what_is_received_is_let_go_and_what_the_user_gave_is_not():
    for stage, size in ((1, 4), (0, ROWS * WIDTH * 4)):
        module = block()
        moved = Offload(module, CPU, 60.0)
        moved.begin_batch([Op(OFFLOAD, stage, 0)])
        x = leaf()
        StageChunk(module, stage, is_last=False, offload=moved).forward(0, x)
        assert x.untyped_storage().nbytes() == size and x.shape == (ROWS, WIDTH)


class InPlace(nn.Module):
    """Changes what has been saved: before the end of the forward, where autograd is to say so."""

    def __init__(self, size):
        super().__init__()
        self._size = size

    def forward(self, x):
        y = x[: self._size].exp()
        z = y.sin()
        y.detach().mul_(2)
        return z + y


@pytest.mark.parametrize("size", [1, 128])
def test_a_change_in_place_is_no_silent_error(size):
    moved, chunk = make(InPlace(size))
    out = chunk.forward(0, torch.randn(128, WIDTH).requires_grad_())
    with pytest.raises(PipelineRuntimeError, match="changed in place after it was saved"):
        moved.leave(1, 0)
        chunk.backward(0, [torch.ones_like(out)])


class Planted(ThreadCopyist):
    """Each copy begins late, or never."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def copy(self, name, pairs):
        copying = copies._InThread(name, pairs)
        run = copying.run

        def late():
            time.sleep(self.seconds)
            run()

        copying.run = late
        if self.seconds < 100:
            self._queue.put(copying)
        return copying


def test_a_late_copy_is_waited_for():
    log = []
    module = block()
    expected = plain(module)
    moved, chunk = make(module, log=log)
    moved._back = Planted(0.2)
    torch.manual_seed(9)
    out = chunk.forward(0, leaf())
    moved.leave(1, 0)
    moved.let_go(1, 0)
    moved.bring_back(1, 0)
    moved.await_back(1, 0)
    (back,) = chunk.backward(0, [torch.ones_like(out)])
    assert same([out, back, *(param.grad for param in module.parameters())], expected)
    assert log[1].name == "reload" and log[1].waited > 0.1 > log[1].hidden


@pytest.mark.parametrize("way", ["out", "back"])
def test_a_copy_that_never_ends_is_an_error_with_a_remedy(way):
    moved, chunk = make(block(), timeout=0.2)
    setattr(moved, f"_{way}", Planted(1000))
    chunk.forward(0, leaf())
    moved.leave(1, 0)
    said = {"out": "has not reached host memory within 0.1 s", "back": "has not come back from host memory"}
    with pytest.raises(
        PipelineRuntimeError, match=f'stage 1 keeps of micro-batch 0 {said[way]}.*"offload_activations"'
    ):
        moved.let_go(1, 0)
        moved.bring_back(1, 0)
        moved.await_back(1, 0)
    moved.clear()
    assert not moved._saved and not moved.host_bytes()


def test_an_error_of_a_copy_is_raised_where_it_is_waited_for():
    copying = ThreadCopyist().copy("offload", [(torch.empty(3), torch.empty(4))])
    with pytest.raises(RuntimeError, match="size"):
        copying.wait(10.0)


def test_a_backward_outside_of_its_stage_is_an_error():
    moved, chunk = make(block())
    out = chunk.forward(0, leaf())
    moved.leave(1, 0)
    moved.let_go(1, 0)
    with pytest.raises(PipelineRuntimeError, match="asks for what is in host memory"):
        chunk.backward(0, [torch.ones_like(out)])
