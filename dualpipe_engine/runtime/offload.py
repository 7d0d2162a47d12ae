"""Offload: what a forward keeps for its backward leaves for host memory, and is back when the backward comes.

Which (stage, micro-batch) leave is the plan's (`schedule/passes/offload.py`, after PipeOffload, arXiv 2503.01328). Of
those the forward runs under `saving`, whose hooks put a handle in the place of every tensor that autograd saves. Of
each storage one copy is made, on a stream for copies: `leave` begins it when F has ended, `let_go` waits for it and
frees the device's memory, `bring_back` takes memory again and begins the copy back, `await_back` waits for that.

What stays: parameters and buffers, small tensors, those on the host already, those without a plain storage, and what
another micro-batch has saved as well, such as the casts of weights that autocast keeps.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..comm.copies import Copying, Pair, copyist, host_empty
from ..comm.tickets import Transfer
from ..errors import PipelineRuntimeError
from ..schedule.op import OFFLOAD, Op
from .recompute import has_storage

Key: TypeAlias = tuple[int, int]
"""Stage and micro-batch."""

LEAST = 1 << 14  #: bytes of the smallest storage that leaves: below, a copy costs more than the memory is worth
NOTHING = nullcontext()


class Offload:
    """Activations of one rank.

    Args:
        module: its stages, whose parameters and buffers stay.
        device: where they run.
        timeout_s: seconds after which the watch gives up a rank that stands still, without knowing why it does; a copy
            that the host waits for is given up before.
        log: takes what became of each activation's copies; None: nobody wants to know.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, timeout_s: float, log: list[Transfer] | None = None
    ) -> None:
        self._module, self._device = module, device
        self._timeout_s, self._log = timeout_s / 2, log
        self._out, self._back = copyist(device), copyist(device)
        self._leaves: Collection[Key] = ()
        self._stays: set[int] = set()
        self._saved: dict[Key, _Saved] = {}
        self._copies: dict[Key, Copying] = {}  # under way
        self._owners: dict[int, tuple[weakref.ref[torch.UntypedStorage], Key]] = {}

    def begin_batch(self, program: Iterable[Op]) -> None:
        """A batch begins, with the program of this rank, which says what leaves."""
        self._leaves = {(op.stage, op.micro) for op in program if op.kind == OFFLOAD}
        self._owners.clear()
        self._stays = {
            _place(tensor) for tensor in chain(self._module.parameters(), self._module.buffers()) if has_storage(tensor)
        }

    def saving(self, stage: int, micro: int) -> AbstractContextManager[object]:
        """Context of the forward, or of a part of it."""
        key = stage, micro
        if key not in self._leaves:
            return NOTHING
        saved = self._saved.get(key)
        if saved is None:
            saved = self._saved[key] = _Saved(self, key)
        return saved_tensors_hooks(saved.pack, _unpack)

    def leaves(self, stage: int, micro: int) -> bool:
        """Whether the activation is one that is offloaded."""
        return (stage, micro) in self._leaves

    def leave(self, stage: int, micro: int) -> None:
        """The forward has ended: begin to copy what it has saved.

        Raises:
            PipelineRuntimeError: some of it was changed in place since.
        """
        if saved := self._saved.get((stage, micro)):
            self._copies[stage, micro] = self._out.copy("offload", saved.begin())

    def let_go(self, stage: int, micro: int) -> None:
        """Free the device's memory, once the copy is done.

        Raises:
            PipelineRuntimeError: it was not in time.
        """
        self._finish((stage, micro), "has not reached host memory")
        for stored in self._of(stage, micro):
            stored.there = None

    def bring_back(self, stage: int, micro: int) -> None:
        """Take memory on the device and begin to copy back."""
        pairs = []
        for stored in self._of(stage, micro):
            assert stored.host is not None
            target = torch.empty(stored.host.shape, dtype=torch.uint8, device=self._device)
            pairs.append((target, stored.host))
            stored.coming = target
        self._copies[stage, micro] = self._back.copy("reload", pairs)

    def await_back(self, stage: int, micro: int) -> None:
        """The backward comes next: wait for what has left.

        Raises:
            PipelineRuntimeError: it was not in time.
        """
        if (stage, micro) not in self._saved:
            return
        self._finish((stage, micro), "has not come back from host memory")
        for stored in self._of(stage, micro):
            stored.there, stored.coming, stored.host = stored.coming, None, None
        del self._saved[stage, micro]

    def host_bytes(self) -> int:
        """Bytes of host memory that are taken now."""
        stored = [stored for key in self._saved for stored in self._of(*key)]
        return sum(each.host.nbytes for each in stored if each.host is not None)

    def clear(self) -> None:
        """Drop everything, after a batch that failed; a device goes on when what it is copying is through."""
        for copying in self._copies.values():
            copying.wait(0.0)
        self._saved.clear()
        self._copies.clear()

    def _of(self, stage: int, micro: int) -> list[_Stored]:
        saved = self._saved.get((stage, micro))
        return [] if saved is None else saved.alive()

    def _finish(self, key: Key, failed: str) -> None:
        copying = self._copies.pop(key, None)
        if copying is None:
            return
        if not copying.wait(self._timeout_s):
            raise PipelineRuntimeError(
                f"what stage {key[0]} keeps of micro-batch {key[1]} {failed} within {self._timeout_s:g} s: the copies "
                'between device and host stand still; raise "p2p_timeout_s", or leave out "offload_activations"'
            )
        if self._log is not None:
            self._log.append(copying.transfer())

    def _stores(self, tensor: Tensor, key: Key) -> bool:
        """Whether a tensor that a forward saves shall leave."""
        if tensor.device != self._device or not has_storage(tensor):
            return False
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if storage.nbytes() < LEAST or place in self._stays:
            return False
        ref, owner = self._owners.get(place, (None, key))
        if ref is not None and ref() is not None and owner != key:
            return False
        self._owners[place] = weakref.ref(storage), key
        return True


class _Saved:
    """What one forward saves."""

    def __init__(self, offload: Offload, key: Key) -> None:
        self._offload, self._key = offload, key
        self._found: dict[int, weakref.ref[_Stored]] = {}  # by where the storage begins
        self._parts: list[weakref.ref[_Part]] = []

    def pack(self, tensor: Tensor) -> _Part | _Kept:
        """Of what autograd saves: a handle."""
        if not self._offload._stores(tensor, self._key):
            return _Kept(tensor)
        place = _place(tensor)
        ref = self._found.get(place)
        stored = None if ref is None else ref()
        if stored is None:
            stored = _Stored(tensor)
            self._found[place] = weakref.ref(stored)
        part = _Part(stored, tensor)
        self._parts.append(weakref.ref(part))
        return part

    def alive(self) -> list[_Stored]:
        """Memory that the backward will ask for."""
        return [stored for ref in self._found.values() if (stored := ref()) is not None]

    def begin(self) -> list[Pair]:
        """The forward has ended: what is to be copied, each where to and where from."""
        for ref in self._parts:
            if (part := ref()) is not None:
                part.check()
        self._parts.clear()
        pairs = []
        for stored in self.alive():
            assert stored.there is not None
            stored.host = host_empty(stored.there)
            pairs.append((stored.host, stored.there))
        return pairs


class _Stored:
    """The bytes of one storage.

    Attributes:
        there: on the device; None while they are away.
        host: in host memory.
        coming: on the device, where a copy is about to put them.
    """

    __slots__ = ("__weakref__", "coming", "host", "there")

    def __init__(self, tensor: Tensor) -> None:
        self.there: Tensor | None = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        self.there.set_(tensor.untyped_storage())  # type: ignore[call-overload]
        self.host: Tensor | None = None
        self.coming: Tensor | None = None


class _Part:
    """A tensor of a storage that leaves."""

    __slots__ = ("__weakref__", "_dtype", "_offset", "_seen", "_size", "_stored", "_stride", "_version")

    def __init__(self, stored: _Stored, tensor: Tensor) -> None:
        self._stored, self._dtype = stored, tensor.dtype
        self._size, self._stride, self._offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        self._seen: Tensor | None = tensor.detach()
        self._version = tensor._version

    def check(self) -> None:
        """Whether it is as it was saved; it may leave."""
        assert self._seen is not None
        _check(self._seen, self._version)
        self._seen = None

    def get(self) -> Tensor:
        if self._seen is not None:
            self.check()
        there = self._stored.there
        if there is None:
            raise PipelineRuntimeError(
                "the backward of an operation asks for what is in host memory, since it runs outside of that of its "
                'stage: leave out "offload_activations"'
            )
        tensor = torch.empty(0, dtype=self._dtype, device=there.device)
        return tensor.set_(there.untyped_storage(), self._offset, self._size, self._stride)  # type: ignore[call-overload,no-any-return]


class _Kept:
    """A tensor that stays."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def get(self) -> Tensor:
        _check(self._tensor, self._version)
        return self._tensor


def _unpack(kept: _Part | _Kept) -> Tensor:
    return kept.get()


def _check(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise PipelineRuntimeError(
            f"a tensor of shape {list(tensor.shape)} was changed in place after it was saved for the backward: "
            'take the operation that makes a new tensor, or leave out "offload_activations"'
        )


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
