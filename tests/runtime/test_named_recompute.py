"""Modules that are computed again: the same gradients, fewer bytes, and sentences for what cannot run twice."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualpipe_engine.errors import ConfigError, PipelineRuntimeError
from dualpipe_engine.models.block import DenseBlock, MoEBlock
from dualpipe_engine.models.config import MoEConfig
from dualpipe_engine.runtime.overlap import PhasedChunk, phases_of
from dualpipe_engine.runtime.recompute import Recompute
from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install

HIDDEN, INNER, HEADS, HEAD, ROTARY, Q_RANK, KV_RANK = 64, 256, 4, 32, 16, 24, 16
TOKENS = (2, 16)
ROWS = 4 * TOKENS[0] * TOKENS[1]  # bytes of one number a token
SIZES = {"hidden": HIDDEN, "heads": HEADS, "head": HEAD}
LATENT = SIZES | {"rotary": ROTARY, "kv_rank": KV_RANK, "q_rank": Q_RANK}


class Made(TorchDispatchMode):
    """Remembers the memory of every tensor that an operation makes, as long as it lives."""

    def __init__(self, *known):
        super().__init__()
        self._made, self._known = [], {tensor.data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(each.untyped_storage()) for each in tree_leaves(out) if torch.is_tensor(each)]
        return out

    def alive(self):
        gc.collect()
        held = {storage.data_ptr(): storage.nbytes() for ref in self._made if (storage := ref()) is not None}
        return sum(size for place, size in held.items() if place not in self._known)


def named(module, names):
    found = {}
    for name, part in module.named_modules():
        outer = any(name.startswith(f"{other}.") for other in found)
        if not outer and any(re.search(each, name) for each in names):
            found[name] = part
    return found


def run(make, names, split=False, by_phases=False, inputs=(*TOKENS, HIDDEN)):
    """Output, gradients, and bytes that live between forward and backward, and after it, of two runs."""
    torch.manual_seed(0)
    block = nn.Sequential(make(), make())
    store = DeferredWeightGrads() if split else None
    if store is not None:
        install(block, store)
    recompute = Recompute(named(block, names))
    recompute.install()
    found = []
    for step in range(2):
        x = torch.randn(inputs, generator=torch.Generator().manual_seed(step)).requires_grad_()
        made = Made(x, *block.parameters())
        if by_phases:
            phases = [
                phase._replace(run=recompute.within(phase.run)) if phase.kind == "compute" else phase
                for phase in phases_of(list(block))
            ]
            chunk = PhasedChunk(block, 0, phases, 60.0, is_last=False, store=store)
            with made:
                out = chunk.forward(0, x)
            size = out.nbytes
            out = out.clone()
            held = made.alive()
            back = chunk.input_backward(0, [torch.ones_like(out)])
            chunk.weight_backward(0)
            found.append((out, back[0].clone(), held))
            del back
        else:
            with made:
                out = recompute.within(block)(x)
            kept, size = out.detach().clone(), out.nbytes
            total = out.sum()
            del out
            held = made.alive()
            if store is None:
                total.backward()
            else:
                with store.defer():
                    total.backward()
                for closure in store.take():
                    closure()
            del total
            found.append((kept, x.grad, held))
        assert made.alive() <= size, "something outlives the backward"
    return found, [param.grad for param in block.parameters()]


def same(one, other):
    for (out, back, _), (out_again, back_again, _) in zip(one[0], other[0], strict=True):
        assert torch.equal(out, out_again) and torch.equal(back, back_again)
    for grad, again in zip(one[1], other[1], strict=True):
        assert (grad is None) == (again is None)
        assert grad is None or torch.equal(grad, again)


KINDS = {
    "dense": lambda: DenseBlock(MoEConfig(**LATENT, dense_inner=INNER)),
    "grouped": lambda: DenseBlock(MoEConfig(**SIZES, dense_inner=INNER, attention="grouped")),
    "experts": lambda: MoEBlock(MoEConfig(**LATENT, experts=4, expert_inner=INNER)),
}


FEW = [("dense", True, False), ("experts", True, True)]
REST = [(kind, split, phased) for kind in KINDS for split, phased in [(False, False), (True, False), (True, True)]]


@pytest.mark.parametrize(
    ("kind", "split", "by_phases"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.all) for case in REST if case not in FEW)],
)
def test_gradients_are_the_same_and_memory_is_less(kind, split, by_phases):
    plain = run(KINDS[kind], [], split, by_phases)
    again = run(KINDS[kind], DenseBlock.recomputed, split, by_phases)
    same(plain, again)
    for (*_, held), (*_, less) in zip(plain[0], again[0], strict=True):
        assert less < 0.75 * held


def test_bytes_that_are_saved():
    """Of a dense block: what two norms and the activation function make, for a token and in fp32."""
    (_, (*_, held)), _ = run(KINDS["grouped"], [])
    (_, (*_, norms)), _ = run(KINDS["grouped"], ["norm"])
    (_, (*_, less)), _ = run(KINDS["grouped"], ["norm", "activation"])
    assert held - norms >= 2 * ROWS * 2 * HIDDEN  # two norms in each of two blocks
    assert norms - less == 2 * ROWS * 2 * INNER  # silu(gate), and its product with the value


class Gate(nn.Module):
    def forward(self, x):
        return silu(x), x * 2


class Pieces(nn.Module):
    """Two outputs, views of them, dropout, and one that is changed in place."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), Gate(), nn.Linear(8, 8)
        self.drop = nn.Sequential(nn.Dropout(0.5), nn.Tanh())

    def forward(self, x):
        one, two = self.gate(self.up(x))
        two.add_(1)
        left, right = one.chunk(2, dim=-1)
        return x + self.down(self.drop(left * right.exp()) * two[..., 8:])


@pytest.mark.parametrize(
    "names", [["gate"], pytest.param(["drop"], marks=pytest.mark.all), ["gate", "drop", "up"], ["down"]]
)
def test_views_random_numbers_and_changes_in_place(names):
    plain, again = (run(Pieces, each, inputs=(4, 8)) for each in ([], names))
    same(plain, again)


class Calls(nn.Module):
    """A named part that does `what` to its input."""

    def __init__(self, what):
        super().__init__()
        self.first, self.part, self.what = nn.Linear(8, 8), Part(what), what

    def forward(self, x):
        x = self.first(x)
        out = self.part(x)
        if self.what == "changed later":
            x.mul_(2)
        return out * x


class Part(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what, self.calls = what, 0

    def forward(self, x):
        self.calls += 1
        if self.what == "in place":
            return x.relu_()
        return x.exp().sin() if self.what != "other again" or self.calls == 1 else x.exp()


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("in place", ConfigError, "part changes its input in place"),
        ("changed later", PipelineRuntimeError, "was changed in place after it was saved for the backward"),
        ("other again", PipelineRuntimeError, "does not do the same when it runs again"),
    ],
)
def test_what_cannot_run_again(what, error, said):
    block = Calls(what)
    recompute = Recompute({"part": block.part})
    recompute.install()
    with pytest.raises(error, match=said):
        recompute.within(block)(torch.ones(2, 8)).sum().backward()


class Attention(nn.Module):
    """The attention of torch takes another way where query, key and value are one tensor."""

    def __init__(self):
        super().__init__()
        self.part = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return x + self.part(x, x, x, need_weights=False)[0]


class Mapped(nn.Module):
    """Calls a named part within transforms of torch.func, in which it runs as it is."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        rows = torch.func.vmap(self.part)(x)
        return rows + torch.func.jvp(self.part, (x,), (x * 2,))[1] + self.part(x)


@pytest.mark.parametrize("make", [Attention, Mapped])
def test_parts_that_torch_calls_in_its_own_ways(make):
    found = []
    for names in ([], ["part"]):
        torch.manual_seed(3)
        block = make().double()
        recompute = Recompute({name: getattr(block, name) for name in names})
        recompute.install()
        x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
        out = recompute.within(block)(x)
        out.sin().sum().backward()
        found.append([out, x.grad, *(param.grad for param in block.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("inner", [False, True])
def test_a_part_that_writes_a_buffer_each_time(inner):
    part = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    block = nn.Sequential(nn.Linear(8, 8), nn.Sequential(part) if inner else part, nn.Tanh())
    recompute = Recompute({"1": block[1]})
    recompute.install()
    with pytest.raises(ConfigError, match=r"1 writes its buffer .*_u, which would be written twice"):
        recompute.within(block)(torch.ones(2, 8)).sum().backward()


class Table(nn.Module):
    """Makes a buffer when it is first needed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", None, persistent=False)

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(8.0).cos()
        return (x * self.table).sin()


def test_a_part_that_makes_a_table_once():
    block = nn.Sequential(nn.Linear(8, 8), Table())
    recompute = Recompute({"1": block[1]})
    recompute.install()
    recompute.within(block)(torch.ones(2, 8)).sum().backward()
    assert block[0].weight.grad is not None


def test_each_call_is_repeated_once():
    block = Calls("nothing")
    recompute = Recompute({"part": block.part})
    recompute.install()
    recompute.within(block)(torch.ones(2, 8)).sum().backward()
    assert block.part.calls == 2
    block(torch.ones(2, 8)).sum().backward()  # outside of a stage nothing is special
    with torch.no_grad():
        recompute.within(block)(torch.ones(2, 8))
    assert block.part.calls == 4


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_that_of_the_forward(inside):
    found = []
    for names in ([], ["0"]):
        torch.manual_seed(1)
        block = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 8))
        recompute = Recompute(named(block, names))
        recompute.install()
        with torch.autocast("cpu", torch.bfloat16):
            total = recompute.within(block)(torch.ones(2, 8)).float().sum()
            if inside:
                total.backward()
        if not inside:
            total.backward()
        found.append([param.grad for param in block.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
