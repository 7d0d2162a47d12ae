"""Where a deferred gradient goes: `main_grad`, hooks, autocast, several uses of one parameter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from weight_grad_cases import check, run
from weight_grad_zoo import HIDDEN, ZOO, data

from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install

BF16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
OFFS = torch.tensor([5, 5, 16], dtype=torch.int32)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


FUNCTIONS = {
    "linear": ((16, 8), (24, 8), F.linear),
    "linear of a transposed weight": ((16, 8), (8, 24), lambda x, w: F.linear(x, w.t())),
    "linear of a slice": ((16, 8), (48, 8), lambda x, w: F.linear(x, w[24:])),
    "linear of columns": ((16, 8), (24, 12), lambda x, w: F.linear(x, w[:, 2:10])),
    "bmm of columns": ((3, 4, 8), (3, 8, 30), lambda x, w: torch.bmm(x, w[:, :, 6:])),
    "matmul": ((2, 8, 8), (8, 24), torch.matmul),
    "one expert": ((16, 8), (3, 24, 8), lambda x, w: F.linear(x, w[1])),
    "bmm": ((3, 4, 8), (3, 8, 24), torch.bmm),
    "grouped": ((16, 8), (3, 24, 8), lambda x, w: F.grouped_mm(x.to(w.dtype), w.transpose(1, 2), offs=OFFS)),
    "einsum": ((16, 8), (3, 8, 4), lambda x, w: torch.einsum("ti,eio->teo", x, w)),
    "conv": ((2, 8, 5, 5), (6, 4, 3, 3), lambda x, w: F.conv2d(x, w, groups=2)),
}


def step(module: nn.Module, store: DeferredWeightGrads, x: Tensor, grad: Tensor, defer: bool = True) -> None:
    out = module(x)
    store.deferring = defer
    out.backward(grad.to(out.dtype))
    for closure in store.take():
        closure()


COUNTED = {name: (partial(Apply, function, *weight), shape) for name, (shape, weight, function) in FUNCTIONS.items()}
COUNTED |= {f"{name} in a module": (build, (2, 5, HIDDEN)) for name, (build, _) in ZOO.items()}
del COUNTED["grouped"]  # the counter does not know it


@pytest.mark.parametrize("name", COUNTED)
def test_each_product_is_computed_once(name: str) -> None:
    """I and W together multiply and add as often as a backward in one piece."""
    build, shape = COUNTED[name]
    flops = []
    for how in ("plain", "IW"):
        with FlopCounterMode(display=False) as counter:
            run(build, data(*shape), how)
        flops.append(counter.get_flop_counts()["Global"])
    assert flops[0] == flops[1] != {}


@pytest.mark.parametrize("defer", [True, False], ids=["W", "B"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_main_grad_collects_in_fp32(name: str, defer: bool) -> None:
    """Over 8 micro-batches bf16 products added in fp32 are within fp32 rounding of the exact sum; bf16 sums are not."""
    shape, weight, function = FUNCTIONS[name]
    torch.manual_seed(0)
    module = Apply(function, *weight).to(torch.bfloat16)
    exact = Apply(function, *weight).double() if name != "grouped" else Apply(function, *weight)
    exact.weight.data.copy_(module.weight.data)
    module.weight.main_grad = main_grad = torch.zeros(weight)
    store = DeferredWeightGrads()
    install(module, store)
    for _ in range(8):
        x = torch.randn(shape).to(torch.bfloat16).requires_grad_()
        grad = torch.randn(module(x).shape).to(torch.bfloat16)
        step(module, store, x, grad, defer)
        out = exact(x.detach().to(exact.weight.dtype))
        out.backward(grad.to(out.dtype))
    assert module.weight.grad is None and module.weight.main_grad is main_grad
    error = (main_grad - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert error < 1e-6


def test_main_grad_of_a_cast_weight() -> None:
    module, store = Apply(F.linear, 24, 8), DeferredWeightGrads()
    module.weight.main_grad = torch.zeros(24, 8)
    install(module, store)
    x, grad = torch.randn(16, 8), torch.randn(16, 24)
    with BF16():
        out = module(x)
    with store.defer():
        out.backward(grad.to(out.dtype))
    for closure in store.take():
        closure()
    want = grad.bfloat16().t() @ x.bfloat16()
    assert torch.equal(module.weight.main_grad, want.float()) and module.weight.grad is None


def test_main_grad_of_any_layout() -> None:
    layer, store = nn.Linear(8, 24, bias=False), DeferredWeightGrads()
    layer.weight.main_grad = torch.zeros(8, 24).t()
    install(layer, store)
    x, grad = torch.randn(3, 8), torch.randn(3, 24)
    step(layer, store, x, grad)
    assert torch.equal(layer.weight.main_grad, grad.t() @ x)


def test_fused_product_is_used_where_it_can_be() -> None:
    calls = []

    def fused(x: Tensor, grad: Tensor, total: Tensor) -> None:
        calls.append((x.shape, grad.shape, total.dtype))
        total += grad.float().t() @ x.float()

    store = DeferredWeightGrads(fused_wgrad=fused)
    for dtype, main_grad, expected in (
        (torch.bfloat16, True, 1),
        (torch.float32, True, 0),
        (torch.bfloat16, False, 0),
    ):
        layer = nn.Linear(8, 24, dtype=dtype)
        layer.weight.main_grad = torch.zeros(24, 8) if main_grad else None
        install(layer, store)
        x, grad = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 3, 24).to(dtype)
        step(layer, store, x, grad)
        assert len(calls) == expected
        got = layer.weight.main_grad if main_grad else layer.weight.grad
        torch.testing.assert_close(
            got.float(), grad.float().view(6, 24).t() @ x.float().view(6, 8), rtol=2e-2, atol=2e-2
        )
        calls.clear()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast(name: str) -> None:
    shape, weight, function = FUNCTIONS[name]
    inputs = [torch.randn(shape) for _ in range(3)]
    check(lambda: Apply(function, *weight), inputs, {"weight"}, BF16)
    check(lambda: Apply(function, *weight).to(torch.bfloat16), inputs, {"weight"}, BF16)


def test_autocast_of_a_module_with_bias() -> None:
    inputs = [torch.randn(4, 5, 8) for _ in range(3)]
    check(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 6)), inputs, {"0.weight", "2.weight"}, BF16
    )


def test_autocast_does_not_keep_a_copy_without_gradient() -> None:
    """The cast copy that autocast caches must not cut later uses of the weight off."""
    layer, store = nn.Linear(8, 8, bias=False), DeferredWeightGrads()
    install(layer, store)
    x = torch.randn(3, 8)
    with BF16():
        first = layer(x)
        second = F.linear(x, layer.weight)
    with store.defer():
        first.sum().backward()
    second.sum().backward()
    want = layer.weight.grad.clone()
    for closure in store.take():
        closure()
    assert torch.equal(layer.weight.grad, 2 * want)


def test_gradient_takes_over_or_adds_as_autograd_does() -> None:
    layer, store = nn.Linear(8, 6, bias=False), DeferredWeightGrads()
    install(layer, store)
    x, grad = torch.randn(3, 8), torch.randn(3, 6)
    step(layer, store, x, grad)
    first = layer.weight.grad
    assert torch.equal(first, grad.t() @ x)
    step(layer, store, x, grad)
    assert layer.weight.grad is first and torch.equal(first, 2 * (grad.t() @ x))


def test_post_accumulate_hooks_run_once_on_the_gradient() -> None:
    """Their parameter belongs to I, as long as it has them."""
    layer, store = nn.Linear(8, 6, bias=False), DeferredWeightGrads()

    def halve(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(0.5)

    hook = layer.weight.register_post_accumulate_grad_hook(halve)
    report = install(layer, store)
    x, grad = torch.randn(3, 8), torch.randn(3, 6)
    for _ in range(2):
        with store.defer():
            layer(x).backward(grad)
        assert not store.take()
    torch.testing.assert_close(layer.weight.grad, 0.75 * (grad.t() @ x))
    assert report.not_deferred == [("weight", "hook on the parameter")]
    hook.remove()
    step(layer, store, x, grad)
    torch.testing.assert_close(layer.weight.grad, 1.75 * (grad.t() @ x))
    assert report.share == 1


def test_hooks_run_for_each_gradient_that_is_added() -> None:
    """Those of the parameter after it, those of the node that adds it with what is added."""
    layer, store = nn.Linear(8, 6, bias=False), DeferredWeightGrads()
    sums: list[Tensor | None] = []
    added: list[Tensor] = []
    node = layer.weight.view_as(layer.weight).grad_fn.next_functions[0][0]
    install(layer, store)
    given = [(torch.randn(3, 8), torch.randn(3, 6)) for _ in range(3)]
    for x, grad in given:
        out = layer(x)
        with store.defer():
            out.backward(grad)
        hook = layer.weight.register_post_accumulate_grad_hook(lambda param: sums.append(param.grad))
        with node.register_prehook(lambda grads: added.append(grads[0])):  # the backward of I runs the node on nothing
            for closure in store.take():
                closure()
        hook.remove()
        assert sums.pop() is layer.weight.grad and not sums
    assert all(torch.equal(one, grad.t() @ x) for one, (x, grad) in zip(added, given, strict=True))


def test_hooks_of_views_run() -> None:
    def hooked(x: Tensor, w: Tensor) -> Tensor:
        view = w.t()
        if view.requires_grad:
            view.register_hook(lambda grad: grad * 2)
        return F.linear(x, view)

    module, store = Apply(hooked, 8, 8), DeferredWeightGrads()
    install(module, store)
    x, grad = torch.randn(4, 8), torch.randn(4, 8)
    step(module, store, x, grad)
    torch.testing.assert_close(module.weight.grad, 2 * x.t() @ grad)


def test_shared_by_split_and_other_operations() -> None:
    """What is not split runs in I; the sum is right up to the order of additions."""

    def mixed(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) + F.linear(x, w.tanh()) + w.mean()

    def gradient(defer: bool) -> Tensor:
        torch.manual_seed(0)
        module, store = Apply(mixed, 8, 8), DeferredWeightGrads()
        if defer:
            install(module, store)
        for _ in range(3):
            step(module, store, torch.randn(4, 8), torch.randn(4, 8), defer)
        return module.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_frozen_weights_leave_nothing() -> None:
    for count, frozen in ((0, ("weight", "bias")), (0, ("weight",)), (1, ("bias",))):
        layer, store = nn.Linear(8, 6), DeferredWeightGrads()
        for name in frozen:
            layer.get_parameter(name).requires_grad_(False)
        install(layer, store)
        out = layer(torch.randn(3, 8, requires_grad=True))
        with store.defer():
            out.sum().backward()
        assert len(store._waiting) == count
        assert all(layer.get_parameter(name).grad is None for name in frozen)


def test_weight_changed_between_f_and_i_is_an_error() -> None:
    layer = nn.Linear(8, 6)
    install(layer, DeferredWeightGrads())
    out = layer(torch.randn(3, 8, requires_grad=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
