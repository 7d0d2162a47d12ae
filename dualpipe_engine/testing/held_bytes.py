"""Bytes that an engine, DeepSpeed's own or ours, holds for weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from ..schedule.jobs.memory import Memory

Engine: TypeAlias = Any
"""Ours, or DeepSpeed's own."""


def held_bytes(engine: Engine) -> Memory:
    """What this rank holds now for its trained parameters; reductions under way and activations are not counted."""
    optimizer = engine.optimizer
    params = [param for param in engine.module.parameters() if param.requires_grad]
    inner = getattr(optimizer, "optimizer", optimizer)
    known = {id(param) for param in params}
    masters = [param for group in inner.param_groups for param in group["params"] if id(param) not in known]
    values = [value for entry in inner.state.values() for value in entry.values()]
    states = [value for value in values if torch.is_tensor(value) and value.dim()]  # no counters of steps
    gradients = [getattr(param, name, None) for param in [*params, *masters] for name in ("grad", "grad_accum")]
    gradients += getattr(optimizer, "fp32_groups_gradients_flat", [])  # of BF16_Optimizer, allocated for good
    tail = getattr(engine, "_tail", None)
    gradients += tail.reduction.held() if tail is not None else []
    return Memory(_bytes(params), _bytes(gradients), _bytes([*masters, *states]), 0)


def _bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of tensors, each storage's part counted once."""
    spans: set[tuple[int, int]] = set()
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            spans.add((tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()))
    total = reached = 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


@contextmanager
def gradient_watch(engine: Engine) -> Iterator[list[int]]:
    """Record the bytes of gradients through the batches in the body: in our engine after each backward, each start of
    a reduction and when all have arrived, in DeepSpeed's own before it reduces, when all are there."""
    found: list[int] = []
    if hasattr(engine, "_tail"):
        tail, reduction = engine._tail, engine._tail.reduction
        calls = [(tail, "accumulate", False), (tail, "reduce", False)]
        if hasattr(reduction, "hand_over"):  # by then all that was under way has arrived
            calls.append((reduction, "hand_over", True))
    else:  # the first thing that DeepSpeed's engine does when it reduces is to ask for tied weights
        calls = [(engine.module, "get_tied_weights_and_groups", True)]
    for owner, name, before in calls:
        setattr(owner, name, _watched(engine, getattr(owner, name), found, before))
    try:
        yield found
    finally:
        for owner, name, _ in calls:
            delattr(owner, name)


def _watched(engine: Engine, call: Callable[..., object], found: list[int], before: bool) -> Callable[..., object]:
    def watched(*args: object) -> object:
        if before:
            found.append(held_bytes(engine).gradients)
        result = call(*args)
        if not before:
            found.append(held_bytes(engine).gradients)
        return result

    return watched
