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
    executor: Executor, own: Sequence[Tensor], away: Callable[[], int] = lambda: 0
) -> Iterator[list[tuple[Op, int]]]:
    """Record the bytes that are held behind each op of the batches in the body. Each F is counted before its output is
    sent; the tensors of transfers that are on their way count.

    Args:
        executor: runs the batches.
        own: tensors that do not count, nor do their gradients: parameters and buffers.
        away: bytes that do not count either, in host memory.
    """
    found: list[tuple[Op, int]] = []
    handlers = executor._handlers
    before = dict(handlers)
    with _Made() as made:
        for kind, handler in before.items():
            handlers[kind] = _watched(handler, lambda: made.bytes(_places(own)) - away(), found)
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


class _Made(TorchDispatchMode):
    """Remembers the storages that operations make, as long as they live. Those of meta tensors hold nothing."""

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
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = weakref.ref(storage)
        return out

    def bytes(self, own: set[int]) -> int:
        """Of what lives, but for storages that begin at `own`."""
        found = {place: storage for place, ref in self._alive.items() if (storage := ref()) is not None}
        self._alive = {place: self._alive[place] for place in found}
        return sum(storage.nbytes() for place, storage in found.items() if place not in own)


def _watched(
    handler: Callable[[Op], None], held: Callable[[], int], found: list[tuple[Op, int]]
) -> Callable[[Op], None]:
    def watched(op: Op) -> None:
        handler(op)
        gc.collect(0)
        found.append((op, held()))

    return watched


def _places(own: Sequence[Tensor]) -> set[int]:
    tensors = [each for tensor in own for each in (tensor, tensor.grad) if each is not None]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
