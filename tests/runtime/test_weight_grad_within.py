"""Layers that differentiate within their own forward, and what runs on threads that autograd made, under a split
backward: the gradients are those of a plain one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install

WIDTH = 6


def differentiated(energy: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool = True) -> Tensor:
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(energy(y).sum(), y, create_graph=create_graph)[0]


def force(block: Block, x: Tensor) -> Tensor:
    """The force of a learned energy, itself trained."""
    return x + torch.tanh(block.linear(x)) - 0.1 * differentiated(lambda y: torch.tanh(block.linear(y)).pow(2), x)


def penalty(block: Block, x: Tensor) -> Tensor:
    slope = differentiated(lambda y: block.out(torch.tanh(block.linear(y))), x)
    return x + block.linear(x) + (slope.pow(2).sum(-1) - 1).pow(2).mean()


def unused(block: Block, x: Tensor) -> Tensor:
    """A slope that is not trained: its backward must leave nothing in any gradient."""
    return x + block.linear(x) * differentiated(lambda y: block.linear(y).tanh(), x, create_graph=False)


def of_weight(block: Block, x: Tensor) -> Tensor:
    """A gradient of the weight, as meta-learning takes it; through a view, too."""
    y = x.detach()
    step, whole = torch.autograd.grad(
        (F.linear(y, block.linear.weight[:3]).tanh().sum(), block.linear(y).pow(2).sum()),
        (block.linear.weight, block.out.weight),
        create_graph=True,
        allow_unused=True,
    )
    assert whole is None
    return F.linear(x, block.linear.weight - 0.1 * step)


def conv(block: Block, x: Tensor) -> Tensor:
    return x + differentiated(lambda y: block.conv(y.unsqueeze(1)).tanh(), x)


def matrices(block: Block, x: Tensor) -> Tensor:
    def energy(y: Tensor) -> Tensor:
        stacked = torch.bmm(y.expand(2, -1, -1), block.stack)
        return torch.einsum("eni,eij->nj", stacked.tanh(), block.stack).tanh()

    return x + differentiated(energy, x)


def dual(block: Block, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = torch.tanh(block.linear(forward_ad.make_dual(x, torch.ones_like(x))))
        value, slope = forward_ad.unpack_dual(out)
    return x + value + 0.1 * slope


def jvp(block: Block, x: Tensor) -> Tensor:
    value, slope = torch.func.jvp(lambda y: torch.tanh(block.linear(y)), (x,), (torch.ones_like(x),))
    return x + value + 0.1 * slope


def per_sample(block: Block, x: Tensor) -> Tensor:
    return x + torch.func.vmap(torch.func.grad(lambda y: torch.tanh(block.linear(y)).sum()))(x)


KINDS = {each.__name__: each for each in (force, penalty, unused, of_weight, conv, matrices, dual, jvp, per_sample)}


class Block(nn.Module):
    def __init__(self, kind: str, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.out, self.conv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1), nn.Conv1d(1, 2, 3)
        self.stack = nn.Parameter(torch.randn(2, WIDTH, WIDTH))
        self.kind, self.checkpointed = kind, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(KINDS[self.kind], self, x, use_reentrant=False)
        return KINDS[self.kind](self, x)


def build(kind: str, checkpointed: bool) -> nn.Sequential:
    return nn.Sequential(Block(kind), nn.Linear(WIDTH, WIDTH), Block(kind, checkpointed)).double()


def gradients(module: nn.Module, how: str) -> dict[str, Tensor]:
    store = DeferredWeightGrads()
    if how != "plain":
        install(module, store)
    if how == "main_grad":
        for param in module.parameters():
            param.main_grad = torch.zeros_like(param)  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, WIDTH, generator=generator, dtype=torch.double, requires_grad=True)
    out = module(x).pow(2).mean()
    if how == "full":
        out.backward()
    else:
        with store.defer():
            out.backward()
        for closure in store.take():
            closure()
    found = {"x": x.grad}
    for name, param in module.named_parameters():
        parts = [part for part in (param.grad, getattr(param, "main_grad", None)) if part is not None]
        found[name] = sum(parts) if parts else None
        if how == "main_grad" and param.dim() > 1:
            assert param.grad is None, f"{name}: not all of its gradient is in main_grad"
    return found


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_differentiates_in_its_forward(kind: str, checkpointed: bool) -> None:
    if kind == "per_sample" and checkpointed:
        pytest.skip("torch.func.grad does not run in a checkpoint")
    want = gradients(build(kind, checkpointed), "plain")
    for how in ("split", "full"):
        for name, grad in gradients(build(kind, checkpointed), how).items():
            if want[name] is None:
                assert grad is None or not grad.any(), name
            else:
                torch.testing.assert_close(grad, want[name], rtol=1e-12, atol=1e-14, msg=f"{how}: {name}")


@pytest.mark.parametrize("kind", ["force", "penalty", "unused", "matrices"])
def test_main_grad_gets_all_of_it(kind: str) -> None:
    want, found = gradients(build(kind, False), "plain"), gradients(build(kind, False), "main_grad")
    for name, grad in found.items():
        expected = torch.zeros_like(grad) if want[name] is None else want[name]
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6, msg=name)  # it is computed in fp32


def test_other_weights_of_such_a_model_are_still_deferred() -> None:
    module, store = build("force", False), DeferredWeightGrads()
    report = install(module, store)
    out = module(torch.randn(4, WIDTH, dtype=torch.double, requires_grad=True)).sum()
    with store.defer():
        out.backward()
    assert module[1].weight.grad is None and "1.weight" not in dict(report.not_deferred)
    for closure in store.take():
        closure()
    assert module[1].weight.grad is not None


def test_a_thread_that_has_the_mode_and_no_frame() -> None:
    """Autograd hands the function modes of the caller to its device threads; there F.linear is just F.linear."""

    class OnDevice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return x + 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            found: list[Tensor] = []
            state = torch.overrides._get_current_function_mode_stack()

            def run() -> None:
                for mode in state:
                    mode.__enter__()
                with torch.enable_grad():
                    found.append(F.linear(grad, ctx.saved_tensors[0]))
                for mode in reversed(state):
                    mode.__exit__(None, None, None)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            return found[0].detach(), None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            return y + torch.autograd.grad(OnDevice.apply(x, self.weight.detach()).sum(), x)[0]

    net = Net()
    install(net, DeferredWeightGrads())
    x = torch.ones(2, WIDTH, requires_grad=True)
    assert torch.equal(net(x), torch.full((2, WIDTH), 2.0 * WIDTH))


def test_the_first_gradient_is_not_copied() -> None:
    """What W makes is what `grad` holds: no second copy of it is alive at any time."""
    layer, store = nn.Linear(64, 48, bias=False), DeferredWeightGrads()
    install(layer, store)
    made: list[int] = []
    out = layer(torch.randn(5, 64))
    with store.defer():
        out.sum().backward()
    (contribution,) = store._waiting
    weight_grad = type(contribution.op).weight_grad

    def spied(op: Any, *args: Any) -> Tensor:
        grad = weight_grad(op, *args)
        made.append(grad.data_ptr())
        return grad

    object.__setattr__(contribution.op, "weight_grad", spied.__get__(contribution.op))
    for closure in store.take():
        closure()
    assert made == [layer.weight.grad.data_ptr()]


def test_w_is_one_call_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualpipe_engine.runtime import weight_grad_split

    calls = []
    run = weight_grad_split._engine_run_backward
    monkeypatch.setattr(weight_grad_split, "_engine_run_backward", lambda *a, **k: calls.append(1) or run(*a, **k))
    stage, store = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12))), DeferredWeightGrads()
    install(stage, store)
    out = stage(torch.randn(3, 8))
    with store.defer():
        out.sum().backward()
    for closure in store.take():
        closure()
    assert len(calls) == 1 and all(layer.weight.grad is not None for layer in stage)


def test_large_gradients_are_made_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualpipe_engine.runtime import weight_grad

    monkeypatch.setattr(weight_grad, "BATCH_BYTES", 3 * 8 * 8 * 4)
    stage, store = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)), nn.Linear(8, 64)), DeferredWeightGrads()
    install(stage, store)
    out = stage(torch.randn(3, 8))
    with store.defer():
        out.sum().backward()
    closures = store.take()
    assert len(closures) == 4  # the large one, three, three, two
    for closure in closures:
        closure()
    assert all(layer.weight.grad is not None for layer in stage)
