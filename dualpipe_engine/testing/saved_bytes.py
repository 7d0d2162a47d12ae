"""Bytes that autograd keeps for backwards that are to come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor


class SavedBytes:
    """Counts, while it is entered, the memory of all tensors that autograd saves on this thread, until it drops them.

    Args:
        own: tensors that are there anyway, such as parameters.

    Attributes:
        now: bytes that are kept.
        peak: the most that were at once.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.now = self.peak = 0
        self._own = {each.untyped_storage().data_ptr() for each in own}
        self._held: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, _Kept.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self._hooks.__exit__(*args)

    def _keep(self, tensor: Tensor) -> _Kept:
        return _Kept(tensor.detach(), self)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self._own:
            self._held[place] += 1
            if self._held[place] == 1:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)

    def drop(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self._own:
            self._held[place] -= 1
            if not self._held[place]:
                self.now -= storage.nbytes()


class _Kept:
    """A saved tensor in the place of itself."""

    def __init__(self, tensor: Tensor, counter: SavedBytes) -> None:
        self._tensor, self._counter = tensor, counter
        counter.add(tensor)

    def tensor(self) -> Tensor:
        return self._tensor

    def __del__(self) -> None:
        self._counter.drop(self._tensor)
