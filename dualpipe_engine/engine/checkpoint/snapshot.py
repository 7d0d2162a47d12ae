"""Snapshot: a copy in host memory of what a file is to hold, so that training can go on while it is written."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...comm.nest import Nest

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def snapshot(value: Nest) -> Nest:
    """A copy of a nest, with its tensors in host memory; those that share memory do so in the copy, too.

    Args:
        value: what `torch.save` takes.
    """
    with torch.no_grad():
        return _Copier().copied(value)


class _Copier:
    def __init__(self) -> None:
        self._kept: list[Any] = []  # so that no address is taken by another
        self._copies: dict[int, Any] = {}  # by address of the original
        self._storages: dict[tuple[torch.device, int, int], torch.UntypedStorage] = {}

    def copied(self, value: Nest) -> Nest:
        if isinstance(value, _PLAIN):
            return value
        if id(value) not in self._copies:
            self._kept.append(value)
            self._copies[id(value)] = self._new(value)
        return self._copies[id(value)]

    def _new(self, value: Nest) -> Nest:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            mapping = self._copies[id(value)] = copy.copy(value)  # with what else it holds, as a state dict does
            for key, each in value.items():
                mapping[key] = self.copied(each)
            return mapping
        if type(value) is list:
            row = self._copies[id(value)] = []
            row.extend(map(self.copied, value))
            return row
        if isinstance(value, tuple):
            parts = [self.copied(each) for each in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        return copy.deepcopy(value)

    def _tensor(self, value: Tensor) -> Tensor:
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        if plain and not (value.is_quantized or value.is_conj() or value.is_neg()):
            found = torch.empty(0, dtype=value.dtype).set_(
                self._storage(value.untyped_storage()), value.storage_offset(), value.size(), value.stride()
            )
        else:
            found = value.detach().cpu().clone()
        if isinstance(value, nn.Parameter):
            return nn.Parameter(found, value.requires_grad)
        return found.requires_grad_(value.requires_grad and value.is_leaf)

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        key = storage.device, storage.data_ptr(), storage.nbytes()
        if key not in self._storages:
            self._storages[key] = storage.clone() if storage.device.type == "cpu" else storage.cpu()
        return self._storages[key]
