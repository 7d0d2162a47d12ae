"""Layers as bytes and tensors: what one rank packs, another unpacks as the object that the user built.

Structure is pickled: classes, submodules, hooks, attributes, parametrizations. Tensors stay apart, as blocks of memory,
so that they can be sent from device to device. All ranks run the same program, so a function or a class without a name
that can be imported (a lambda, a closure) needs no more than its code and what it closes over, and what belongs to a
process (its PipelineModule, the arguments of its LayerSpecs, process groups, the device) is replaced by the receiver's.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .blocks import Shape, in_block, to_blocks
from .by_code import Reduced, reduced

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.Size)
_BY_NAME = (
    *(nn.Module, Tensor, int, float, complex, str, bytes, tuple, frozenset, type(None), type, torch.dtype),
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType),
)
"""Kinds of objects that are carried, or that pickle finds by name."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


Key: TypeAlias = tuple[object, ...]
"""Stands in a pickle for what a process has of its own: a name, and plain values that say which."""

GroupKey: TypeAlias = tuple[tuple[int, ...], int]
"""Of a process group: its ranks, and its number among those that have the same."""

_Reference: TypeAlias = (
    tuple[Literal["tensor"], int]
    | tuple[Literal["device"], None]
    | tuple[Literal["group"], GroupKey]
    | tuple[Literal["own"], Key]
)
"""What a pickle holds in the place of an object."""


class LocalObjects:
    """What belongs to a process: object -> key here, and key -> object there.

    What Python's modules hold at their top belongs to it too.

    Args:
        own: key -> object; keys mean the same on all ranks.
        device: where layers run.
        group_key: key of a process group, or None.
        group_of: the process group of a key.
    """

    def __init__(
        self,
        own: Mapping[Key, object],
        device: torch.device,
        group_key: Callable[[ProcessGroup], GroupKey | None] = lambda group: None,
        group_of: Callable[[GroupKey], ProcessGroup | None] = lambda key: None,
    ) -> None:
        self._own = own
        self.device = device
        self.group_key, self.group_of = group_key, group_of
        self._keys: dict[int, Key] = {}
        for key, value in own.items():
            self._keys.setdefault(id(value), key)

    def key_of(self, value: object) -> Key | None:
        """The key of an object that belongs to this process, or None."""
        key = self._keys.get(id(value))
        return self._globals.get(id(value)) if key is None and not isinstance(value, _BY_NAME) else key

    def value_of(self, key: Key) -> object:
        """The object that this process has for a key."""
        if key[0] != "global":
            return self._own[key]
        _, module, name = key
        return vars(sys.modules[str(module)])[str(name)]

    @cached_property
    def _globals(self) -> dict[int, tuple[str, str, str]]:
        """Objects with a name in a module of Python, those that pickle finds by name aside: id -> key.

        Asked for the few objects that are neither modules nor tensors: to look through all that is imported takes as
        long as to carry a small layer.
        """
        left_out: dict[type, bool] = {}
        found: dict[int, tuple[str, str, str]] = {}
        for name, module in sys.modules.copy().items():
            for key, value in vars(module).copy().items() if type(module) is types.ModuleType else ():
                kind = type(value)
                if kind not in left_out:
                    left_out[kind] = issubclass(kind, _BY_NAME)
                if not left_out[kind] and key[:2] != "__":
                    found.setdefault(id(value), ("global", name, key))
        return found


class _Ref:
    """Stands for the memory of a tensor in a pickle."""

    def __init__(self, number: int) -> None:
        self.number = number


class Packed(NamedTuple):
    """Values taken apart.

    Args:
        data: their structure.
        shapes: the tensors in it.
        blocks: the memory that these lie in (uint8, views of the tensors).
        owners: block -> number of the value in which it is met first.
    """

    data: bytes
    shapes: list[Shape]
    blocks: list[Tensor]
    owners: list[int]


def pack(values: Sequence[object], local: LocalObjects) -> Packed:
    """Take values apart; what several of them hold stays one object.

    Raises:
        Exception: whatever pickling raises for what cannot be carried.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, local)
    pickler.dump(len(values))
    ends = []
    for value in values:
        pickler.dump(value)
        ends.append(len(pickler.tensors))
    shapes, blocks, first = to_blocks(pickler.tensors, local.device)
    return Packed(file.getvalue(), shapes, blocks, [bisect_right(ends, number) for number in first])


def unpack(data: bytes, shapes: list[Shape], blocks: list[Tensor], local: LocalObjects) -> list[object]:
    """Put together what `pack` has taken apart; `blocks` become the memory of the tensors."""
    host = {shape.block for shape in shapes if shape.host}
    blocks = [block.cpu() if number in host else block for number, block in enumerate(blocks)]
    unpickler = _Unpickler(io.BytesIO(data), local, [in_block(shape, blocks) for shape in shapes])
    return [unpickler.load() for _ in range(unpickler.load())]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, local: LocalObjects) -> None:
        super().__init__(file, protocol=5)
        self._local = local
        self.tensors: list[Tensor] = []
        self._kept: list[object] = []  # so that no id is used twice
        self._parts: set[int] = set()  # what modules and tensors keep their parts in

    def persistent_id(self, value: object) -> _Reference | None:
        if type(value) in _PLAIN or id(value) in self._parts:
            return None
        if type(value) is _Ref:
            return "tensor", value.number
        if type(value) is dict and value.keys() >= _OF_EVERY_MODULE:  # a module's state
            self._parts.update(id(value[key]) for key in _OF_EVERY_MODULE)
            return None
        key = self._local.key_of(value)
        if key is not None:
            return "own", key
        if isinstance(value, torch.distributed.ProcessGroup):
            group = self._local.group_key(value)
            if group is None:
                raise pickle.PicklingError("a process group that has no counterpart on the other rank")
            return "group", group
        if isinstance(value, torch.device) and value.type == self._local.device.type:
            return "device", None
        return None

    def reducer_override(self, value: object) -> Reduced:  # type: ignore[override]  # typeshed knows no sixth entry
        return self._tensor(value) if isinstance(value, Tensor) else reduced(value)

    def _tensor(self, value: Tensor) -> Reduced:
        kind = type(value)
        if (kind is not Tensor and not isinstance(value, nn.Parameter)) or value.layout != torch.strided:
            return NotImplemented  # it knows what it is made of
        if value.is_quantized:
            return NotImplemented
        memory = value.detach()
        if value.is_conj() or value.is_neg():
            memory = memory.resolve_conj().resolve_neg()
        self.tensors.append(memory)
        trained = value.requires_grad and value.is_leaf  # another is computed again from what it came from
        hooks = value._backward_hooks if value.is_leaf else None
        attributes = dict(vars(value))
        self._parts.add(id(attributes))
        state = (attributes, hooks, value._post_accumulate_grad_hooks, value.grad if value.is_leaf else None)
        reference = _Ref(len(self.tensors) - 1)
        self._kept.append(reference)
        filled = state if any(state[:1]) or any(each is not None for each in state[1:]) else None
        return _make_tensor, (kind, reference, trained), filled, None, None, _set_tensor


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, local: LocalObjects, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._local = local
        self._tensors = tensors

    def persistent_load(self, pid: _Reference) -> object:
        if pid[0] == "tensor":
            return self._tensors[pid[1]]
        if pid[0] == "device":
            return self._local.device
        if pid[0] == "group":
            group = self._local.group_of(pid[1])
            if group is None:
                raise pickle.UnpicklingError("a process group that has no counterpart on this rank")
            return group
        return self._local.value_of(pid[1])


# -- tensors -------------------------------------------------------------------------------------------------------


_Hooks: TypeAlias = dict[int, Callable[[Tensor], Tensor | None]] | None
_TensorState: TypeAlias = tuple[dict[str, object], _Hooks, _Hooks, Tensor | None]
"""Of a tensor: attributes, hooks, those behind the accumulation of its gradient, gradient."""


def _make_tensor(kind: type[Tensor], memory: Tensor, trained: bool) -> Tensor:
    if kind is Tensor:
        return memory.requires_grad_(trained)
    return torch.Tensor._make_subclass(kind, memory, trained)  # type: ignore[no-any-return]


def _set_tensor(tensor: Tensor, state: _TensorState) -> None:
    attributes, hooks, after, grad = state
    vars(tensor).update(attributes)
    if hooks:
        tensor._backward_hooks = hooks
    if after:
        tensor._post_accumulate_grad_hooks = after
    if grad is not None:
        tensor.grad = grad
