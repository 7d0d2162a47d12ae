"""Layers as bytes and tensors: what one rank packs, another unpacks as the object that the user built.

Structure is pickled: classes, submodules, hooks, attributes, parametrizations. Tensors stay apart, as blocks of memory,
so that they can be sent from device to device. All ranks run the same program, so a function or a class without a name
that can be imported (a lambda, a closure) needs no more than its code and what it closes over, and what belongs to a
process (its PipelineModule, the arguments of its LayerSpecs, process groups, the device) is replaced by the receiver's.
"""

from __future__ import annotations

import importlib
import io
import marshal
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ALIGNMENT = 16  # bytes; enough for every dtype
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.Size)
_BY_NAME = (
    *(nn.Module, Tensor, int, float, complex, str, bytes, tuple, frozenset, type(None), type, torch.dtype),
    *(types.ModuleType, types.FunctionType, types.BuiltinFunctionType),
)
"""Kinds of objects that are carried, or that pickle finds by name."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class Shape:
    """A tensor without its memory.

    Args:
        block: which block it lies in; None on the meta device.
        offset: its first element in the block, in elements.
        host: whether it is in host memory although layers run elsewhere.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    block: int | None
    offset: int
    host: bool


class Context:
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
        own: Mapping[Any, Any],
        device: torch.device,
        group_key: Callable[[Any], Any] = lambda group: None,
        group_of: Callable[[Any], Any] = lambda key: None,
    ) -> None:
        self._own = own
        self.device = device
        self.group_key, self.group_of = group_key, group_of
        self._keys: dict[int, Any] = {}
        for key, value in own.items():
            self._keys.setdefault(id(value), key)

    def key_of(self, value: Any) -> Any:
        """The key of an object that belongs to this process, or None."""
        key = self._keys.get(id(value))
        return self._globals.get(id(value)) if key is None and not isinstance(value, _BY_NAME) else key

    def value_of(self, key: Any) -> Any:
        """The object that this process has for a key."""
        return vars(sys.modules[key[1]])[key[2]] if key[0] == "global" else self._own[key]

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


def pack(value: Any, context: Context) -> tuple[bytes, list[Shape], list[Tensor]]:
    """Take apart.

    Returns:
        The structure, the tensors in it, and the blocks of memory that they lie in (uint8, views of the tensors).

    Raises:
        Exception: whatever pickling raises for what cannot be carried.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, context)
    pickler.dump(value)
    shapes, blocks = _blocks(pickler.tensors, context.device)
    return buffer.getvalue(), shapes, blocks


def unpack(data: bytes, shapes: list[Shape], blocks: list[Tensor], context: Context) -> Any:
    """Put together what `pack` has taken apart; `blocks` become the memory of the tensors."""
    host = {shape.block for shape in shapes if shape.host}
    blocks = [block.cpu() if number in host else block for number, block in enumerate(blocks)]
    tensors = [_in_block(shape, blocks) for shape in shapes]
    return _Unpickler(io.BytesIO(data), context, tensors).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: Any, context: Context) -> None:
        super().__init__(file, protocol=5)
        self._context = context
        self.tensors: list[Tensor] = []
        self._kept: list[Any] = []  # so that no id is used twice
        self._parts: set[int] = set()  # what modules and tensors keep their parts in

    def persistent_id(self, value: Any) -> Any:
        if type(value) in _PLAIN or id(value) in self._parts:
            return None
        if type(value) is _Ref:
            return "tensor", value.number
        if type(value) is dict and value.keys() >= _OF_EVERY_MODULE:  # a module's state
            self._parts.update(id(value[key]) for key in _OF_EVERY_MODULE)
            return None
        key = self._context.key_of(value)
        if key is not None:
            return "own", key
        if isinstance(value, torch.distributed.ProcessGroup):
            key = self._context.group_key(value)
            if key is None:
                raise pickle.PicklingError("a process group that has no counterpart on the other rank")
            return "group", key
        if isinstance(value, torch.device) and value.type == self._context.device.type:
            return ("device",)
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, types.FunctionType):
            return NotImplemented if _importable(value) else _function(value)
        if isinstance(value, types.CellType):
            return _make_cell, (), _contents(value), None, None, _set_cell
        if isinstance(value, types.MethodType):
            return _bind, (value.__func__, value.__self__)
        if isinstance(value, types.ModuleType):
            return importlib.import_module, (value.__name__,)
        if isinstance(value, type):
            return NotImplemented if _importable(value) else _local_class(value)
        if isinstance(value, torch.jit.ScriptModule):
            file = io.BytesIO()
            torch.jit.save(value, file)
            return _load_script, (file.getvalue(),)
        if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
            kind = parametrize.type_before_parametrizations(value)
            return _empty, (kind,), dict(vars(value)), None, None, _set_parametrized
        return NotImplemented

    def _tensor(self, value: Tensor) -> Any:
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
    def __init__(self, file: Any, context: Context, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._context = context
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "tensor":
            return self._tensors[rest[0]]
        if kind == "device":
            return self._context.device
        if kind == "group":
            group = self._context.group_of(rest[0])
            if group is None:
                raise pickle.UnpicklingError("a process group that has no counterpart on this rank")
            return group
        return self._context.value_of(rest[0])


# -- tensors -------------------------------------------------------------------------------------------------------


def _make_tensor(kind: type[Tensor], memory: Tensor, trained: bool) -> Tensor:
    if kind is Tensor:
        return memory.requires_grad_(trained)
    return torch.Tensor._make_subclass(kind, memory, trained)  # type: ignore[no-any-return]


def _set_tensor(tensor: Tensor, state: Any) -> None:
    attributes, hooks, after, grad = state
    vars(tensor).update(attributes)
    if hooks:
        tensor._backward_hooks = hooks
    if after:
        tensor._post_accumulate_grad_hooks = after
    if grad is not None:
        tensor.grad = grad


def _blocks(tensors: list[Tensor], device: torch.device) -> tuple[list[Shape], list[Tensor]]:
    """Tensors that overlap in memory share a block, each other one has its own."""
    shapes: list[Shape | None] = [None] * len(tensors)
    blocks: list[Tensor] = []
    for members in _overlapping(tensors):
        host = tensors[members[0]].device.type == "cpu" != device.type
        if len(members) == 1:
            alone = tensors[members[0]]
            start, stop = _extent(alone)
            if stop - start > alone.numel() * alone.itemsize:  # gaps
                alone = tensors[members[0]] = alone.contiguous()
        start = min(_extent(tensors[index])[0] for index in members) // _ALIGNMENT * _ALIGNMENT
        stop = max(_extent(tensors[index])[1] for index in members)
        storage = tensors[members[0]].untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8, device=storage.device)
        blocks.append(raw.set_(storage, start, (stop - start,), (1,)))
        for index in members:
            each = tensors[index]
            offset = int(each.storage_offset()) - start // each.itemsize
            shapes[index] = Shape(each.dtype, tuple(each.shape), each.stride(), len(blocks) - 1, offset, host)
    for index, each in enumerate(tensors):
        if each.device.type == "meta":
            shapes[index] = Shape(each.dtype, tuple(each.shape), each.stride(), None, 0, False)
    return [shape for shape in shapes if shape is not None], blocks


def _overlapping(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Numbers of tensors, those together that share memory."""
    held: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device.type != "meta":
            held.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(index)
    for indices in held.values():
        ordered = sorted(indices, key=lambda index: _extent(tensors[index]))
        together, end = [ordered[0]], _extent(tensors[ordered[0]])[1]
        for index in ordered[1:]:
            start, stop = _extent(tensors[index])
            if start < end:
                together.append(index)
                end = max(end, stop)
            else:
                yield together
                together, end = [index], stop
        yield together


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last byte, in its storage, that a tensor reaches."""
    start = int(tensor.storage_offset()) * tensor.itemsize
    if not tensor.numel():
        return start, start
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.itemsize


def _in_block(shape: Shape, blocks: list[Tensor]) -> Tensor:
    if shape.block is None:
        return torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
    block = blocks[shape.block]
    tensor = torch.empty(0, dtype=shape.dtype, device=block.device)
    return tensor.set_(block.untyped_storage(), shape.offset, shape.size, shape.stride)


# -- functions, classes, modules -------------------------------------------------------------------------------------


def _importable(value: Any) -> bool:
    """Whether the name of a function or class leads to it."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _function(value: types.FunctionType) -> Any:
    module = sys.modules.get(value.__module__ or "")
    if module is None or vars(module) is not value.__globals__:
        raise pickle.PicklingError(f"the function {value.__qualname__} is of no module")
    code = marshal.dumps(value.__code__)
    # What it closes over may hold the function itself, so it comes after.
    state = (
        value.__closure__,
        value.__defaults__,
        value.__kwdefaults__,
        dict(vars(value)),
        value.__qualname__,
    )
    cells = len(value.__closure__ or ())
    return _make_function, (code, value.__module__, value.__name__, cells), state, None, None, _set_function


def _make_function(code: bytes, module: str, name: str, cells: int) -> types.FunctionType:
    empty = tuple(_make_cell() for _ in range(cells))
    made = types.FunctionType(marshal.loads(code), vars(sys.modules[module]), name, None, empty or None)
    made.__module__ = module
    return made


def _set_function(function: types.FunctionType, state: Any) -> None:
    closure, defaults, keyword_defaults, attributes, qualname = state
    for own, given in zip(function.__closure__ or (), closure or (), strict=True):
        _set_cell(own, _contents(given))
    function.__defaults__, function.__kwdefaults__ = defaults, keyword_defaults
    function.__qualname__ = qualname
    vars(function).update(attributes)


def _make_cell() -> types.CellType:
    return types.CellType()


def _bind(function: Any, owner: Any) -> types.MethodType:
    return types.MethodType(function, owner)


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # empty
        return ()


def _set_cell(cell: types.CellType, contents: tuple[Any, ...]) -> None:
    if contents:
        cell.cell_contents = contents[0]


def _local_class(value: type) -> Any:
    base = next(each for each in value.__mro__[1:] if _importable(each))
    if _found_classes(base, value.__module__, value.__qualname__) != [value]:
        raise pickle.PicklingError(f"the class {value.__qualname__} has no name that leads to it")
    return _find_class, (base, value.__module__, value.__qualname__)


def _find_class(base: type, module: str, qualname: str) -> type:
    found = _found_classes(base, module, qualname)
    if len(found) != 1:
        raise pickle.UnpicklingError(f"the class {qualname} has no name that leads to it")
    return found[0]


def _found_classes(base: type, module: str, qualname: str) -> list[type]:
    below: list[type] = list(type.__subclasses__(base))
    found: list[type] = []
    for each in below:
        below.extend(set(type.__subclasses__(each)).difference(below))
        if (each.__module__, each.__qualname__) == (module, qualname):
            found.append(each)
    return found


def _empty(kind: type) -> Any:
    return kind.__new__(kind)  # type: ignore[call-overload]


def _set_parametrized(module: nn.Module, state: dict[str, Any]) -> None:
    vars(module).update(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)


def _load_script(data: bytes) -> Any:
    return torch.jit.load(io.BytesIO(data))
