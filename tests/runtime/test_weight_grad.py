"""Installed stages: every gradient of a zoo of modules, what is deferred, what is reported, and what is undone."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weight_grad_cases import check, run, same
from weight_grad_zoo import (
    BLOCK,
    CHECKPOINTS,
    HIDDEN,
    ZOO,
    BareInCheckpoint,
    Block,
    Checkpointed,
    Experts,
    Lora,
    Tied,
    data,
    tokens,
)

from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, DeferReport, install, uninstall


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
        store = DeferredWeightGrads()
        report = install(module, store)
        out = module(torch.randn(2, 5, HIDDEN, requires_grad=True))
        with store.defer():
            thread = threading.Thread(target=out.sum().backward)
            thread.start()
            thread.join()
        assert len(store._waiting) == 5
        assert report.deferred_numel == sum(p.numel() for p in module.parameters() if p.dim() > 1)


def test_store_hands_over_in_order_and_once() -> None:
    store, seen = DeferredWeightGrads(), []
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


def test_a_module_that_asks_for_the_store_gets_it() -> None:
    class Own(nn.Module):
        weight_grad_store: Any = None

    stage, store = nn.Sequential(Own(), nn.Linear(2, 2)), DeferredWeightGrads()
    install(stage, store)
    assert stage[0].weight_grad_store is store
    assert not hasattr(stage[1], "weight_grad_store")
    uninstall(stage)
    assert stage[0].weight_grad_store is None


def test_user_closures_run_without_a_graph() -> None:
    """Gradients that need gradients would break what clips and reduces them in place."""
    store, x, seen = DeferredWeightGrads(), torch.ones(2, requires_grad=True), []
    store.put(lambda: seen.append(2 * x))
    for closure in store.take():
        closure()
    assert not seen[0].requires_grad


def test_a_weight_closure_works_once_and_frees_its_tensors() -> None:
    layer, store = nn.Linear(HIDDEN, HIDDEN), DeferredWeightGrads()
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
    """The graph behind the linear inputs is gone, with what its nodes keep."""
    saved: list[Any] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            kept = x.exp()
            ctx.kept = kept
            saved.append(weakref.ref(kept))
            return x + 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * ctx.kept

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Probe.apply(self.a(x)))

    net, store = Net(), DeferredWeightGrads()
    install(net, store)
    out = net(torch.randn(3, HIDDEN))
    with store.defer():
        out.sum().backward()
    del out
    gc.collect()
    assert saved[0]() is None
    assert len(store._waiting) == 2


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
        module, store = parts(how), DeferredWeightGrads()
        report = install(module, store)
        module(torch.randn(2, 5, HIDDEN)).sum()
        named = [name for name, reason in report.not_deferred if "compiled" in reason]
        assert len(named) == len(list(module[1].parameters()))


def test_compiled_once() -> None:
    """The mode of a container must not show in a compiled part: its guards would ask for another compilation."""
    from torch._dynamo.backends.debugging import aot_eager

    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        compiled.append(graph)
        return aot_eager(graph, inputs)

    module = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), torch.compile(nn.Linear(HIDDEN, HIDDEN), backend=backend))
    install(module, DeferredWeightGrads())
    for _ in range(3):
        module(torch.randn(2, HIDDEN))
    assert len(compiled) == 1


def test_compiled_part_under_the_mode() -> None:
    """A module with a matrix of its own calls a compiled part: the compiler's fake tensors are not split."""

    class Net(nn.Module):
        def __init__(self, compiled: bool) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
            self.part = torch.compile(Block(), backend="aot_eager") if compiled else Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x @ self.own)

    inputs = data(2, 5, HIDDEN)
    want, got = run(partial(Net, False), inputs, "plain"), run(partial(Net, True), inputs, "IW", {"own"})
    for a, b in zip(want[1].values(), got[1].values(), strict=True):
        torch.testing.assert_close(a, b)
    module, store = Net(True), DeferredWeightGrads()
    install(module, store)
    module(inputs[0])
    assert store.split_params == {module.own}


def test_tensor_subclasses_stay_plain() -> None:
    class Tagged(Tensor):
        pass

    layer, store = nn.Linear(HIDDEN, HIDDEN), DeferredWeightGrads()
    install(layer, store)
    out = layer(torch.randn(3, HIDDEN).as_subclass(Tagged))
    assert type(out) is Tagged and not store.split_params


def test_copies_are_not_installed() -> None:
    module, store = nn.Sequential(Block(Experts), nn.Linear(HIDDEN, 4)), DeferredWeightGrads()
    install(module, store)
    x = torch.randn(2, 5, HIDDEN)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        with store.defer():
            other(x).sum().backward()
        assert not store.take()
        assert all(part.forward.__self__ is part for part in other.modules())
        report = install(other, store)
        other(x)
        assert report.share > 0.9


def test_compiling_an_installed_module_keeps_gradients_right() -> None:
    want = run(Block, data(2, 5, HIDDEN), "plain")[1]
    torch.manual_seed(0)
    module, store = Block(), DeferredWeightGrads()
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
            self.seen_as_view = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
            for param in (self.hooked.weight, self.seen_as_view):
                param.register_hook(lambda grad: grad * 2)

        def forward(self, x: Tensor) -> Tensor:
            return Double.apply(self.plain(self.hooked(x) @ self.seen_as_view.t()), self.own)

    check(Net, data(2, 5, HIDDEN), {"plain.weight"})
    module, store = Net(), DeferredWeightGrads()
    report = install(module, store)
    module(torch.randn(2, 5, HIDDEN))
    reasons = dict(report.not_deferred)
    assert "hook" in reasons["hooked.weight"] and "hook" in reasons["seen_as_view"]
    assert "no split operation" in reasons["own"]


def test_report_counts_and_names() -> None:
    module, store = nn.Sequential(nn.Embedding(11, HIDDEN), Lora(), Block()), DeferredWeightGrads()
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
    module, store = Tied(True, nn.Sequential(Block(Experts), nn.ReLU())), DeferredWeightGrads()
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
    first, second = DeferredWeightGrads(), DeferredWeightGrads()
    install(module, first)
    assert inspect.signature(module[1].mlp[0].forward) == inspect.signature(nn.Linear(1, 1).forward)
    install(module, second)
    out = module(torch.randn(2, 5, HIDDEN))
    with second.defer(), first.defer():
        out.sum().backward()
    assert len(second._waiting) == 5 and not first.take()
    uninstall(module)
    assert {name: vars(part).get("forward") for name, part in module.named_modules()} == before
    assert module[2].forward == mine


def test_no_grad_and_evaluation_leave_nothing() -> None:
    module, store = Block(Experts), DeferredWeightGrads()
    x = torch.randn(2, 5, HIDDEN)
    want = module(x)
    report = install(module, store)
    with torch.no_grad():
        assert torch.equal(module(x), want)
    assert report.deferred_numel == 0
    out = module(x)
    with store.defer():
        out.sum().backward()
    assert len(store._waiting) == 5


def test_i_and_b_may_alternate() -> None:
    """Micro-batches of one batch mix full and split backward, as schedules do."""
    inputs = data(2, 5, HIDDEN)
    want = run(Block, inputs, "plain")[1]
    torch.manual_seed(0)
    module, store = Block(), DeferredWeightGrads()
    install(module, store)
    for index, x in enumerate(inputs):
        out = module(x.clone())
        torch.manual_seed(index)
        store.deferring = index % 2 == 1
        out.backward(torch.randn(out.shape))
        for closure in store.take():
            closure()
    assert all(same(param.grad, want[name]) for name, param in module.named_parameters())
