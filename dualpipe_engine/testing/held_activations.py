"""Bytes of activations that an engine of ours holds on the CPU, op by op."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..schedule.op import Op

Engine: TypeAlias = Any
"""Ours."""
Nest: TypeAlias = Any
"""What operations take and make."""


class _Made(TorchDispatchMode):
    """Remembers the storages that operations make, as long as they live."""

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
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage.data_ptr()] = weakref.ref(storage)
        return out

    def bytes(self, own: set[int]) -> int:
        """Of what lives, but for storages that begin at `own`."""
        found = {place: storage for place, ref in self._alive.items() if (storage := ref()) is not None}
        self._alive = {place: self._alive[place] for place in found}
        return sum(storage.nbytes() for place, storage in found.items() if place not in own)


@contextmanager
def activation_watch(engine: Engine) -> Iterator[list[tuple[Op, int]]]:
    """Record the bytes of activations behind each op of the batches in the body: of all that operations have made and
    that lives, without parameters, their gradients and host memory. Each F is counted before its output is sent.

    The tensors of transfers that are on their way count, which are small beside what a stage keeps.
    """
    found: list[tuple[Op, int]] = []
    handlers = engine._executor._handlers
    before = dict(handlers)
    own = [*engine.module.parameters(), *engine.module.buffers()]
    with _Made() as made:
        for kind, handler in before.items():
            handlers[kind] = _watched(handler, lambda: made.bytes(_places(own)) - _host(engine), found)
        try:
            yield found
        finally:
            handlers.update(before)


def _watched(
    handler: Callable[[Op], None], held: Callable[[], int], found: list[tuple[Op, int]]
) -> Callable[[Op], None]:
    def watched(op: Op) -> None:
        handler(op)
        gc.collect(0)
        found.append((op, held()))

    return watched


def _places(own: Sequence[torch.Tensor]) -> set[int]:
    tensors = [each for tensor in own for each in (tensor, tensor.grad) if each is not None]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _host(engine: Engine) -> int:
    return 0 if engine._offload is None else engine._offload.host_bytes()
