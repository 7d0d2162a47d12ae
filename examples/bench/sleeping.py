"""Stages that sleep instead of computing: forward, input and weight gradient each take the time they are given.

A sleeping process leaves its processor to others, so many ranks can run on a few cores and still show what a schedule
does. The tensors are real and small; they travel between processes as in training. What a stage computes with them is
part of its time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from dualpipe_engine.compat.weight_grad_store import run_backward

WIDTH = 8


@dataclass
class Times:
    """Seconds of one stage; `fb` is an overlapped forward and full backward, None where pairs do not overlap.

    `slept` counts the sleeps of each kind; `late` is what the machine adds to a sleep, see `lateness`.
    """

    f: float
    i: float
    w: float
    fb: float | None = None
    quiet: bool = False
    late: float = 0.0

    def __post_init__(self) -> None:
        self.slept = {"f": 0, "i": 0, "w": 0, "fb": 0}

    def sleep(self, kind: str, since: float) -> None:
        """Sleep for what is left of the time of `kind`, which began at `since` (`time.perf_counter()`)."""
        if not self.quiet:
            self.slept[kind] += 1
            if seconds := getattr(self, kind):
                time.sleep(max(0.0, seconds - self.late - (time.perf_counter() - since)))

    def part(self, share: float) -> Times:
        """The times of a part of the stage."""
        fb = None if self.fb is None else self.fb * share
        return Times(self.f * share, self.i * share, self.w * share, fb, late=self.late)


def lateness(seconds: float, repeats: int = 40) -> float:
    """Seconds by which a sleep of `seconds` ends late on this machine (median)."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        time.sleep(seconds)
        found.append(time.perf_counter() - start - seconds)
    return median(found)


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, times: Times) -> torch.Tensor:
        ctx.times = times
        start = time.perf_counter()
        y = x.clone()
        times.sleep("f", start)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.times.sleep("i", time.perf_counter())
        return grads[0], None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, times: Times) -> torch.Tensor:
        ctx.times = times
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.times.sleep("w", time.perf_counter())
        return grads[0], None


class _Deferred(torch.autograd.Function):
    """The product of `SleepingStage` with a weight gradient that goes into a store where the store asks for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, stage: SleepingStage) -> torch.Tensor:
        ctx.stage = stage
        ctx.save_for_backward(x)
        start = time.perf_counter()
        y = x * weight
        stage.times.sleep("f", start)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        stage, (x,), grad = ctx.stage, ctx.saved_tensors, grads[0]
        weight = stage.weight

        def weight_gradient() -> None:
            start = time.perf_counter()
            found = (grad * x).sum(0)
            weight.grad = found if weight.grad is None else weight.grad + found
            stage.times.sleep("w", start)

        start = time.perf_counter()
        back = grad * weight.detach()
        stage.times.sleep("i", start)
        if stage.weight_grad_store.deferring:
            stage.weight_grad_store.put(weight_gradient)
        else:
            weight_gradient()
        return back, None, None


class SleepingStage(nn.Module):
    """y = x * weight, [rows, WIDTH], slowly.

    Without a `weight_grad_store` the weight gradient is a node of its own in the autograd graph, which autograd runs
    with the rest of the backward and torch.distributed.pipelining runs apart. With one it is deferred.
    """

    def __init__(self, times: Times) -> None:
        super().__init__()
        self.times = times
        self.weight_grad_store: Any = None  # dualpipe_engine sets it
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight_grad_store is not None:
            return _Deferred.apply(x, self.weight, self)
        return _Input.apply(x, self.times) * _Weight.apply(self.weight, self.times)


class OverlappingStage(SleepingStage):
    """A stage whose pairs take `times.fb`, through the protocol of DeepSeek's DualPipe."""

    @classmethod
    def overlapped_forward_backward(
        cls,
        module0: OverlappingStage,
        inputs0: list[torch.Tensor],
        criterion0: Any,
        labels0: Any,
        module1: OverlappingStage,
        loss1: torch.Tensor | None,
        outputs1: list[torch.Tensor] | None,
        output_grads1: list[torch.Tensor] | None,
    ) -> tuple[Any, torch.Tensor | None]:
        start = time.perf_counter()
        module0.times.quiet = module1.times.quiet = True
        try:
            output = module0(*inputs0)
            loss = None if criterion0 is None else criterion0(output, *labels0)
            if loss1 is not None:
                loss1.backward()
            else:
                run_backward(outputs1, output_grads1)
        finally:
            module0.times.quiet = module1.times.quiet = False
        module0.times.sleep("fb", start)
        return output, loss


def stage_class(times: Times) -> type[SleepingStage]:
    return SleepingStage if times.fb is None else OverlappingStage


def mean(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss."""
    return (output - labels).square().mean()
