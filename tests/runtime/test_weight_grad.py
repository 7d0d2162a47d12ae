"""Installed stages: every gradient of a zoo of modules, what is deferred, what is reported, and what is undone."""

from __future__ import annotations

import gc
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from weight_grad_cases import check, run, same

from dualpipe_engine.runtime.weight_grad import DeferReport, WeightGradStore, install, uninstall

HIDDEN = 8


class Conv1D(nn.Module):
    """A linear layer with its weight as [in, out], as in GPT-2."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, outer))
        self.bias = nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        self.a, self.b = nn.Linear(HIDDEN, 2, bias=False), nn.Linear(2, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


class Experts(nn.Module):
    """A router by a bare `F.linear` and experts as one 3-D parameter."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(experts, HIDDEN))
        self.up = nn.Parameter(torch.randn(experts, 2 * HIDDEN, HIDDEN))
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, 2 * HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, HIDDEN)
        score, expert = F.linear(rows, self.router).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        offs = torch.bincount(expert, minlength=self.router.shape[0]).cumsum(0).to(torch.int32)
        hidden = F.silu(F.grouped_mm(rows[order], self.up.transpose(1, 2), offs=offs))
        out = F.grouped_mm(hidden, self.down.transpose(1, 2), offs=offs)
        return (score[:, None] * torch.empty_like(out).index_copy(0, order, out)).view(x.shape)


class Block(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = Conv1D(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = mlp() if mlp else nn.Sequential(nn.Linear(HIDDEN, 12), nn.ReLU(inplace=True), nn.Linear(12, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)


BLOCK = {"qkv.weight", "out.weight", "mlp.0.weight", "mlp.2.weight"}


class Tied(nn.Module):
    """Embedding and head share a weight, by a module or by a bare function."""

    def __init__(self, functional: bool, body: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, HIDDEN, padding_idx=3)
        self.body = body or nn.Linear(HIDDEN, HIDDEN)
        self.head = None if functional else nn.Linear(HIDDEN, 11, bias=False)
        if self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.embed(tokens)).tanh()
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


class TwoTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.third.weight = self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh()).tanh())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Checkpointed(nn.Module):
    """`wrap(function, x)` recomputes `inner`."""

    def __init__(self, wrap: Callable[..., Tensor], inner: Callable[[], nn.Module] = Block, call: bool = False) -> None:
        super().__init__()
        self.inner = inner()
        self.wrap = wrap
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.wrap((lambda x: self.inner(self.inner(x))) if self.call else self.inner, x)


class BareInCheckpoint(nn.Module):
    """Checkpoints a function of its own parameter, with no module in it; square, so that a mix-up would fit."""

    def __init__(self, wrap: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        return self.wrap(lambda x: F.linear(F.linear(x, self.weight).sin(), self.weight), x)


def deepspeed_checkpoint(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    checkpointing = pytest.importorskip("deepspeed.runtime.activation_checkpointing.checkpointing")
    return checkpointing.checkpoint(function, x)


CHECKPOINTS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "deepspeed": deepspeed_checkpoint,
}


def data(*shape: int, count: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(count)]


def tokens(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 11, (2, 5), generator=generator) for _ in range(count)]


ZOO: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "linear": (lambda: nn.Linear(HIDDEN, 5), {"weight"}),
    "block": (Block, BLOCK),
    "shared module": (Twice, {f"layer.{name}" for name in BLOCK}),
    "two tied linears": (TwoTied, {"first.weight"}),
    "lora": (Lora, {"a.weight", "b.weight"}),
    "experts": (Experts, {"router", "up", "down"}),
    "block of experts": (lambda: Block(Experts), {"qkv.weight", "mlp.up", "mlp.down", "mlp.router"}),
    "attention of torch": (
        lambda: nn.TransformerEncoderLayer(HIDDEN, 2, 12, dropout=0.0, batch_first=True),
        {"linear1.weight", "linear2.weight"},
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, 5)), nn.Linear(5, 4)),
        {"1.weight"},
    ),
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name: str) -> None:
    build, deferred = ZOO[name]
    check(build, data(2, 5, HIDDEN), deferred)


@pytest.mark.parametrize("body", [None, Block])
@pytest.mark.parametrize("functional", [True, False])
def test_tied_embedding_and_head(functional: bool, body: Callable[[], nn.Module] | None) -> None:
    check(lambda: Tied(functional, body and body()), tokens(), {"embed.weight"})


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("call", [False, True], ids=["module", "function of modules"])
def test_checkpointed(kind: str, call: bool) -> None:
    wrap = CHECKPOINTS[kind]
    deferred = {f"inner.{name}" for name in BLOCK}
    check(lambda: Checkpointed(wrap, call=call), data(2, 5, HIDDEN), deferred)
    check(
        lambda: Checkpointed(wrap, lambda: Block(Experts), call),
        data(2, 5, HIDDEN),
        {"inner.mlp.up", "inner.mlp.router"},
    )


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("inner", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("outer", CHECKPOINTS)
def test_nested_checkpoint(outer: str, inner: str) -> None:
    def build() -> nn.Module:
        nested = Checkpointed(CHECKPOINTS[inner])
        return Checkpointed(CHECKPOINTS[outer], lambda: nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nested))

    check(build, data(2, 5, HIDDEN), {"inner.0.weight"} | {f"inner.1.inner.{name}" for name in BLOCK})


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bare_function_in_checkpoint(kind: str) -> None:
    check(lambda: BareInCheckpoint(CHECKPOINTS[kind]), data(HIDDEN, HIDDEN), set())


def test_backward_on_another_thread() -> None:
    """CUDA runs backward, and so a recompute, on threads that never saw the forward."""

    def wrap(kind: str) -> Callable[..., Tensor]:
        return CHECKPOINTS[kind]

    for kind in ("reentrant", "non-reentrant"):
        module = Checkpointed(wrap(kind), lambda: Block(Experts))
        store = WeightGradStore()
        report = install(module, store)
        out = module(torch.randn(2, 5, HIDDEN, requires_grad=True))
        with store.defer():
            thread = threading.Thread(target=out.sum().backward)
            thread.start()
            thread.join()
        assert len(store.take()) == 5
        assert report.deferred_numel == sum(p.numel() for p in module.parameters() if p.dim() > 1)


def test_store_hands_over_in_order_and_once() -> None:
    store, seen = WeightGradStore(), []
    for index in range(3):
        store.put(partial(seen.append, index))
    closures = store.take()
    assert not store.take()
    for closure in closures:
        closure()
    assert seen == [0, 1, 2]
    with store.defer():
        assert store.deferring
        with store.defer():
            pass
        assert store.deferring
    assert not store.deferring


def test_a_weight_closure_works_once_and_frees_its_tensors() -> None:
    layer, store = nn.Linear(HIDDEN, HIDDEN), WeightGradStore()
    install(layer, store)
    x = torch.randn(3, HIDDEN)
    alive = weakref.ref(x.untyped_storage())
    out = layer(x)
    with store.defer():
        out.sum().backward()
    (closure,) = store.take()
    del x, out
    gc.collect()
    assert layer.weight.grad is None and layer.bias.grad is not None
    closure()
    want = layer.weight.grad.clone()
    closure()
    assert torch.equal(layer.weight.grad, want)
    gc.collect()
    assert alive() is None


def test_after_i_only_what_w_needs_is_alive() -> None:
    """The activations that non-linear functions and products of activations saved are gone; linear inputs stay."""
    saved: list[Any] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            kept = x.exp()
            ctx.save_for_backward(kept)
            saved.append(weakref.ref(kept))
            return x + 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Probe.apply(self.a(x)))

    net, store = Net(), WeightGradStore()
    install(net, store)
    out = net(torch.randn(3, HIDDEN))
    with store.defer():
        out.sum().backward()
    del out
    gc.collect()
    assert saved[0]() is None
    assert len(store.take()) == 2


def test_compiled_parts_stay_plain_and_are_named() -> None:
    def parts(how: str) -> nn.Module:
        inner: Any = Block()
        if how == "compile":
            inner = torch.compile(inner, backend="aot_eager")
        elif how == "method":
            inner.compile(backend="aot_eager")
        return nn.Sequential(nn.Linear(HIDDEN, HIDDEN), inner)

    want = run(lambda: parts("plain"), data(2, 5, HIDDEN), "plain")
    for how in ("compile", "method"):
        got = run(lambda how=how: parts(how), data(2, 5, HIDDEN), "IW", {"0.weight"})
        for a, b in zip(want[1].values(), got[1].values(), strict=True):
            torch.testing.assert_close(a, b)
        module, store = parts(how), WeightGradStore()
        report = install(module, store)
        module(torch.randn(2, 5, HIDDEN)).sum()
        named = [name for name, reason in report.not_deferred if "compiled" in reason]
        assert len(named) == len(list(module[1].parameters()))


def test_compiling_an_installed_module_keeps_gradients_right() -> None:
    want = run(Block, data(2, 5, HIDDEN), "plain")[1]
    torch.manual_seed(0)
    module, store = Block(), WeightGradStore()
    install(module, store)
    compiled = torch.compile(module, backend="aot_eager")
    for index, x in enumerate(data(2, 5, HIDDEN)):
        out = compiled(x.requires_grad_())
        torch.manual_seed(index)
        with store.defer():
            out.backward(torch.randn(out.shape))
        assert not store.take()
    for name, param in module.named_parameters():
        torch.testing.assert_close(param.grad, want[name])


def test_hooked_weights_and_custom_functions_stay_plain() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, w = ctx.saved_tensors
            return grad @ w.t(), x.flatten(0, 1).t() @ grad.flatten(0, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hooked, self.plain = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.own = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
            self.hooked.weight.register_hook(lambda grad: grad * 2)

        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(self.plain(self.hooked(x)), self.own)

    check(Net, data(2, 5, HIDDEN), {"plain.weight"})
    module, store = Net(), WeightGradStore()
    report = install(module, store)
    module(torch.randn(2, 5, HIDDEN))
    reasons = dict(report.not_deferred)
    assert "hook" in reasons["hooked.weight"] and "no split operation" in reasons["own"]


def test_report_counts_and_names() -> None:
    module, store = nn.Sequential(nn.Embedding(11, HIDDEN), Lora(), Block()), WeightGradStore()
    report = install(module, store)
    assert isinstance(report, DeferReport) and report.deferred_numel == 0
    module(tokens()[0])
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    deferred = {name for name, p in trained.items() if p.dim() > 1 and not name.startswith("0.")}
    assert report.total_numel == sum(p.numel() for p in trained.values())
    assert report.deferred_numel == sum(trained[name].numel() for name in deferred)
    assert {name for name, _ in report.not_deferred} == trained.keys() - deferred
    text = str(report)
    assert f"{report.share:.1%}" in text and "embedding (1, such as 0.weight)" in text and "\n" not in text


def test_only_modules_that_need_it_keep_the_mode() -> None:
    module, store = Tied(True, nn.Sequential(Block(Experts), nn.ReLU())), WeightGradStore()
    install(module, store)
    module(tokens()[0])
    kept = {name for name, part in module.named_modules() if "forward" in vars(part)}
    assert kept == {"", "embed", "body.0.qkv", "body.0.out", "body.0.mlp"}


def test_uninstall_and_install_again() -> None:
    class Own(nn.Linear):
        pass

    module = nn.Sequential(Own(HIDDEN, HIDDEN), Block(), nn.Tanh())
    before = {name: vars(part).get("forward") for name, part in module.named_modules()}
    mine = module[2].forward
    vars(module[1])["forward"] = custom = partial(Block.forward, module[1])
    before["1"] = custom
    first, second = WeightGradStore(), WeightGradStore()
    install(module, first)
    assert inspect.signature(module[1].mlp[0].forward) == inspect.signature(nn.Linear(1, 1).forward)
    install(module, second)
    out = module(torch.randn(2, 5, HIDDEN))
    with second.defer(), first.defer():
        out.sum().backward()
    assert len(second.take()) == 5 and not first.take()
    uninstall(module)
    assert {name: vars(part).get("forward") for name, part in module.named_modules()} == before
    assert module[2].forward == mine


def test_higher_order_gradients_fail_clearly() -> None:
    layer = nn.Linear(HIDDEN, HIDDEN)
    install(layer, WeightGradStore())
    x = torch.randn(3, HIDDEN, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_grad_and_evaluation_leave_nothing() -> None:
    module, store = Block(Experts), WeightGradStore()
    x = torch.randn(2, 5, HIDDEN)
    want = module(x)
    report = install(module, store)
    with torch.no_grad():
        assert torch.equal(module(x), want)
    assert report.deferred_numel == 0
    out = module(x)
    with store.defer():
        out.sum().backward()
    assert len(store.take()) == 5


def test_i_and_b_may_alternate() -> None:
    """Micro-batches of one batch mix full and split backward, as schedules do."""
    inputs = data(2, 5, HIDDEN)
    want = run(Block, inputs, "plain")[1]
    torch.manual_seed(0)
    module, store = Block(), WeightGradStore()
    install(module, store)
    for index, x in enumerate(inputs):
        out = module(x.clone())
        torch.manual_seed(index)
        store.deferring = index % 2 == 1
        out.backward(torch.randn(out.shape))
        for closure in store.take():
            closure()
    assert all(same(param.grad, want[name]) for name, param in module.named_parameters())
