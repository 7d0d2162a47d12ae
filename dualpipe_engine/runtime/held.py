"""Bytes that the ops of a rank leave behind: of all that operations make, what still lives."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..comm.nest import Nest
from ..schedule.op import F, I, Op
from .executor import Executor


@contextmanager
def held_behind(
    executor: Executor, own: Callable[[], Sequence[Tensor]], away: Callable[[], int] = lambda: 0
) -> Iterator[list[tuple[Op, int]]]:
    """Record the bytes that are held behind each op of the batches in the body, without what is on its way between
    stages.

    Args:
        executor: runs the batches.
        own: tells tensors that do not count, nor do their gradients: parameters and buffers.
        away: bytes that do not count either, in host memory.
    """
    found: list[tuple[Op, int]] = []
    handlers = executor._handlers
    before = dict(handlers)
    with HeldBytes() as held:
        for kind, handler in before.items():
            handlers[kind] = _watched(handler, lambda: held.but([*own(), *executor.passing()]) - away(), found)
        try:
            yield found
        finally:
            handlers.update(before)


def added_bytes(held: Sequence[tuple[Op, int]]) -> dict[tuple[str, int], int]:
    """(F or I, stage) -> bytes that the first of these ops adds."""
    found: dict[tuple[str, int], int] = {}
    before = 0
    for op, size in held:
        if op.kind in (F, I):
            found.setdefault((op.kind, op.stage), size - before)
        before = size
    return found


class HeldBytes(TorchDispatchMode):
    """Counts, while it is entered, the memory of what operations make and that still lives."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Collection[type],
        args: tuple[Nest, ...] = (),
        kwargs: dict[str, Nest] | None = None,
    ) -> Nest:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:  # which has no memory
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = weakref.ref(storage)
        return out

    def but(self, own: Sequence[Tensor]) -> int:
        """Bytes of all that lives, but for `own` and their gradients."""
        gc.collect(0)
        grads = [tensor.grad for tensor in own if tensor.is_leaf]  # torch warns of those of others
        others = {tensor.untyped_storage().data_ptr() for tensor in (*own, *grads) if tensor is not None}
        found = {place: storage for place, ref in self._alive.items() if (storage := ref()) is not None}
        self._alive = {place: self._alive[place] for place in found}
        return sum(storage.nbytes() for place, storage in found.items() if place not in others)


def _watched(
    handler: Callable[[Op], None], held: Callable[[], int], found: list[tuple[Op, int]]
) -> Callable[[Op], None]:
    def watched(op: Op) -> None:
        handler(op)
        found.append((op, held()))

    return watched
