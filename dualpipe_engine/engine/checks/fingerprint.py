"""Fingerprint: what can be told of a layer without its values, as text that does not depend on the process."""

from __future__ import annotations

import types
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

_INTERNAL = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
_HOOKS = tuple(sorted(name for name in _INTERNAL if name.endswith("_hooks")))
_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.Size)
ATTRIBUTE = " attribute "
"""In the name of each fact about an attribute, which replicas may set as they like."""


def fingerprint(layer: object, name: str) -> dict[str, str]:
    """Facts of a layer: classes of its modules, hooks, attributes; shape, dtype, hooks and `requires_grad` of tensors.

    Args:
        layer: what a stage calls.
        name: of the layer, in front of the names of facts.
    """
    if not isinstance(layer, nn.Module):
        return {name: text(layer)}
    facts: dict[str, str] = {}
    for path, part in layer.named_modules(prefix=name):
        facts[path] = _name(type(part))
        for hooks in _HOOKS:
            if held := vars(part).get(hooks):
                facts[f"{path}{hooks.replace('_', ' ')}"] = _names(held.values())
        for key, value in vars(part).items():
            if key not in _INTERNAL:
                facts[f"{path}{ATTRIBUTE}{key}"] = text(value)
        for key, param in part._parameters.items():
            if param is not None:
                facts[f"{path}.{key}"] = _tensor(param)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                lost = ", not persistent" if key in part._non_persistent_buffers_set else ""
                facts[f"{path}.{key}"] = f"buffer {_tensor(buffer)}{lost}"
    return facts


def difference(one: dict[str, str], other: dict[str, str]) -> str | None:
    """The first fact that differs, as a sentence about `other`; None: all are the same."""
    for name in one | other:
        if one.get(name) != other.get(name):
            return f"{name} is {other.get(name, 'absent')} instead of {one.get(name, 'absent')}"
    return None


def _tensor(tensor: Tensor) -> str:
    fact = f"{list(tensor.shape)} {tensor.dtype}"
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        fact += ", frozen"
    hooks = [*(tensor._backward_hooks or {}).values(), *(tensor._post_accumulate_grad_hooks or {}).values()]
    return fact + (f", hooks {_names(hooks)}" if tensor.is_leaf and hooks else "")


def _names(functions: Iterable[object]) -> str:
    return ", ".join(map(text, functions))


def _name(kind: type | types.FunctionType) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def text(value: object, depth: int = 2) -> str:
    """A value as text: plain ones as they are, others by their kind."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, partial):
        return f"partial of {text(value.func)}"
    if isinstance(value, types.MethodType):
        return text(value.__func__)
    if isinstance(value, (type, types.FunctionType)):
        return _name(value)
    if isinstance(value, Tensor):
        return _tensor(value)
    if depth and (type(value) is list or type(value) is tuple):
        return f"[{', '.join(text(each, depth - 1) for each in value)}]"
    if depth and type(value) is dict:
        return f"{{{', '.join(f'{text(key, 0)}: {text(each, depth - 1)}' for key, each in value.items())}}}"
    return _name(type(value))
