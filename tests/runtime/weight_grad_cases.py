"""Runs a module with plain autograd and with split backward, and compares every gradient bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dualpipe_engine.runtime.weight_grad import DeferredWeightGrads, install

Run = tuple[list[Tensor], dict[str, Tensor | None], list[Tensor | None]]


def run(
    build: Callable[[], nn.Module],
    inputs: list[Tensor],
    how: str,
    deferred: set[str] | None = None,
    context: Any = nullcontext,
) -> Run:
    """Train-step gradients of `build()` over micro-batches.

    Args:
        how: "plain" autograd; "B", installed but nothing deferred; "IW", deferred, W two micro-batches late.
        deferred: names of the parameters whose `grad` must not change during I.

    Returns:
        Outputs, gradients by parameter name, and gradients of the inputs.
    """
    torch.manual_seed(0)
    module = build()
    store = DeferredWeightGrads()
    if how != "plain":
        install(module, store)
    params = dict(module.named_parameters())
    outputs, input_grads, queue = [], [], []
    for index, data in enumerate(inputs):
        x = data.clone().requires_grad_() if data.is_floating_point() else data
        torch.manual_seed(index)
        with context():
            out = module(x)
        before = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in params.items()}
        with store.defer() if how == "IW" else nullcontext():
            out.backward(torch.randn(out.shape).to(out.dtype))
        if how == "IW":
            queue.append(store.take())
            for name in deferred or ():
                held, value = before[name]
                assert params[name].grad is held, name
                assert held is None or torch.equal(held, value), name
        assert not store.take()
        outputs.append(out.detach())
        input_grads.append(x.grad)
        while len(queue) > 2 or (queue and index == len(inputs) - 1):
            closures = queue.pop(0)
            assert closures or not deferred
            for closure in closures:
                closure()
    return outputs, {name: p.grad for name, p in params.items()}, input_grads


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def check(build: Callable[[], nn.Module], inputs: list[Tensor], deferred: set[str], context: Any = nullcontext) -> None:
    """Full backward through installed modules, and I and W, give autograd's gradients; `deferred` wait for W."""
    want = run(build, inputs, "plain", context=context)
    for how in ("B", "IW"):
        got = run(build, inputs, how, deferred, context)
        assert all(map(same, got[0], want[0])), "outputs"
        for name in want[1]:
            assert same(got[1][name], want[1][name]), (how, name)
        assert all(map(same, got[2], want[2])), (how, "inputs")
