"""Sketch: what a module on the meta device does in a forward, of which the chain is found and the stages are checked.

Its output has the right shapes, and values that depend on the module's name and on the tensors that it takes. So two
runs agree where their modules were given the same, which shows what passes around the blocks without one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from zlib import crc32

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..comm.nest import Nest
from .stubs import first_tensor, placeholder, shadow

Forwards = Mapping[str, Callable[..., Nest]]
"""Names of modules, and what runs in place of their forward."""


def sketches(model: nn.Module, blocks: Collection[str]) -> Forwards:
    """Forwards with which a model on the meta device runs on CPU tensors: of blocks, and of the modules around them
    that have weights or buffers of their own.

    Args:
        model: on the meta device.
        blocks: names of its blocks.
    """
    found: dict[str, Callable[..., Nest]] = {}

    def visit(module: nn.Module, name: str) -> None:
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if path in blocks or child._parameters or child._buffers:
                found[path] = partial(_sketch, path, shadow(child), path in blocks)
            else:
                visit(child, path)

    visit(model, "")
    return found


@contextmanager
def in_place(module: nn.Module, forwards: Forwards) -> Iterator[None]:
    """Let the parts of `module` that are named run these forwards."""
    parts = dict(module.named_modules(remove_duplicate=False))
    changed = [(parts[name], forward) for name, forward in forwards.items() if name in parts]
    for part, forward in changed:
        part.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part, _ in changed:
            part.__dict__.pop("forward", None)


def _sketch(name: str, original: nn.Module, block: bool, *args: Nest, **kwargs: Nest) -> Nest:
    taken = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    hidden = first_tensor(*args, **kwargs) if taken else torch.zeros(())
    try:
        shapes = placeholder(original, torch.zeros(()), *args, **kwargs)
    except Exception:
        if not block:
            raise
        shapes = hidden  # what its experts do depends on values; the usual block returns a hidden state alone
    learns = any(param.requires_grad for param in original.parameters())
    if next(original.parameters(), None) is None:  # such as rotary angles, of which a hidden state tells the dtype
        taken = [each for each in taken if not each.is_floating_point()]
    start = torch.tensor(crc32(name.encode()) % 1000 / 1000)
    with torch.no_grad():
        mark = sum((_mark(each) for each in taken), start)
    mark = mark + torch.zeros((), requires_grad=learns and torch.is_grad_enabled())

    def value(shape: Nest) -> Nest:
        if not isinstance(shape, torch.Tensor):
            return shape
        steps = torch.arange(shape.numel()).view(shape.shape)
        if not shape.is_floating_point():
            return (steps % 2).to(shape.dtype)
        made = (steps * 0.37 + mark).sin()
        same = any(each is hidden for each in taken) and hidden.is_floating_point() and hidden.shape == shape.shape
        return (made + hidden.detach().float().tanh() if same else made).to(shape.dtype)

    return pytree.tree_map(value, shapes)


def _mark(tensor: torch.Tensor) -> torch.Tensor:
    """A number that depends on the values and on their places (scalar)."""
    values = tensor.detach().to(torch.float32).reshape(-1).clamp(-1e4, 1e4)
    return (values * torch.linspace(0.5, 1.5, max(len(values), 1))[: len(values)]).sum() / max(len(values), 1)
