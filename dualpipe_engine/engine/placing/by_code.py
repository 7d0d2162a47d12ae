"""By code: how functions, classes and modules are pickled to which no name leads, or that pickle cannot take apart."""

from __future__ import annotations

import importlib
import io
import marshal
import pickle
import sys
import types
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.utils import parametrize

Reduced: TypeAlias = tuple[object, ...] | types.NotImplementedType
"""What `__reduce__` returns: a function, its arguments and what follows; or NotImplemented."""

_Cells: TypeAlias = tuple[types.CellType, ...] | None
_FunctionState: TypeAlias = tuple[_Cells, tuple[object, ...] | None, dict[str, object] | None, dict[str, object], str]
"""Of a function: what it closes over, defaults, those of keywords, attributes, qualified name."""


def reduced(value: object) -> Reduced:
    """What `reducer_override` of a pickler returns; NotImplemented for what pickle does by itself."""
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


def _importable(value: type | types.FunctionType) -> bool:
    """Whether the name of a function or class leads to it."""
    found: object = sys.modules.get(getattr(value, "__module__", None) or "")
    for name in value.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is value


def _function(value: types.FunctionType) -> Reduced:
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


def _set_function(function: types.FunctionType, state: _FunctionState) -> None:
    closure, defaults, keyword_defaults, attributes, qualname = state
    for own, given in zip(function.__closure__ or (), closure or (), strict=True):
        _set_cell(own, _contents(given))
    function.__defaults__, function.__kwdefaults__ = defaults, keyword_defaults
    function.__qualname__ = qualname
    vars(function).update(attributes)


def _make_cell() -> types.CellType:
    return types.CellType()


def _bind(function: types.FunctionType, owner: object) -> types.MethodType:
    return types.MethodType(function, owner)


def _contents(cell: types.CellType) -> tuple[object, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # empty
        return ()


def _set_cell(cell: types.CellType, contents: tuple[object, ...]) -> None:
    if contents:
        cell.cell_contents = contents[0]


def _local_class(value: type) -> Reduced:
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


def _empty(kind: type) -> object:
    return kind.__new__(kind)  # type: ignore[call-overload]


def _set_parametrized(module: nn.Module, state: dict[str, object]) -> None:
    vars(module).update(state)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]
        parametrize._inject_property(module, name)


def _load_script(data: bytes) -> torch.jit.ScriptModule:
    return torch.jit.load(io.BytesIO(data))
