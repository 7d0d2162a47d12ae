"""Bytes that operations have made and that live on."""

from __future__ import annotations

import gc
import math
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LEAVES = 256  #: bytes of the leaves without memory that stand in the place of what passed a cut
PATIENCE_S = 5.0


class Made(TorchDispatchMode):
    """Remembers the memory of every tensor that an operation returns, but those of a module, as long as it lives.

    Args:
        module: whose parameters and buffers do not count.
        collects: whether what lives in cycles of references is collected before it is counted.
    """

    def __init__(self, module, collects=True):
        super().__init__()
        self._collects = collects
        self._made = []
        self._own = {each.data_ptr() for each in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._made.append(weakref.ref(tensor.untyped_storage()))
        return out

    def alive(self, most=math.inf):
        """Bytes; if more than `most`, those that remain once the threads that have sent let go of what they held."""
        until = time.monotonic() + PATIENCE_S
        while (found := self._alive()) > most and time.monotonic() < until:
            time.sleep(0.01)
        return found

    def _alive(self):
        if self._collects:
            gc.collect()
        held = {storage.data_ptr(): storage.nbytes() for ref in self._made if (storage := ref()) is not None}
        return sum(size for place, size in held.items() if place not in self._own)
