"""Stubs: what stands in a stage's model where modules of other stages were.

A stub keeps attribute access, through a shadow of the original on the meta device, and holds no weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..comm.nest import Nest


class Taken(BaseException):
    """Ends the forward of a stage's model: the first block of the next stage has been handed `hidden`.

    No Exception, so that nothing within the model's forward catches it."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def shadow(module: nn.Module) -> nn.Module:
    """A copy on the meta device; nothing of its weights is copied."""
    memo: dict[int, torch.Tensor] = {}
    for param in module.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


class Stub(nn.Module):
    """Stands for a module of another stage.

    Args:
        original: shadow of the module.
        run: takes the module's arguments and returns what the model's forward goes on with.
    """

    def __init__(self, original: nn.Module, run: Callable[..., Nest]) -> None:
        super().__init__()
        self.__dict__["_original"] = original  # no submodule: it must not count
        self.__dict__["_run"] = run

    def forward(self, *args: Nest, **kwargs: Nest) -> Nest:
        return self._run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.__dict__["_original"], name)


class _Wrapped(nn.Module):
    """A block of this stage, wrapped; attributes are the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        block = self.__dict__["_modules"]["block"]
        return block if name == "block" else getattr(block, name)


class Inject(_Wrapped):
    """The first block of the model, given the received hidden state in place of its first argument."""

    def __init__(self, block: nn.Module, received: Callable[[], torch.Tensor]) -> None:
        super().__init__(block)
        self.__dict__["_received"] = received

    def forward(self, *args: Nest, **kwargs: Nest) -> Nest:
        if args:
            return self.block(self._received(), *args[1:], **kwargs)
        return self.block(**(kwargs | {next(iter(kwargs)): self._received()}))


class Changed(_Wrapped):
    """A block whose arguments are changed: (args, kwargs) -> (args, kwargs)."""

    def __init__(self, block: nn.Module, change: Callable[[Nest], Nest]) -> None:
        super().__init__(block)
        self.__dict__["_change"] = change

    def forward(self, *args: Nest, **kwargs: Nest) -> Nest:
        args, kwargs = self._change((args, kwargs))
        return self.block(*args, **kwargs)


class End(_Wrapped):
    """The last block of the model, after which the stage ends because another has the epilogue."""

    def forward(self, *args: Nest, **kwargs: Nest) -> Nest:
        raise Taken(first_tensor(self.block(*args, **kwargs)))


def first_tensor(*args: Nest, **kwargs: Nest) -> torch.Tensor:
    return next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))


def placeholder(original: nn.Module, hidden: torch.Tensor, *args: Nest, **kwargs: Nest) -> Nest:
    """What `original` (a shadow) would return, with zeros for the tensors: shapes from a run on the meta device, dtype
    of floating-point tensors and device from `hidden`. Plain values are exact."""

    def to_meta(value: Nest) -> Nest:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = next((p.dtype for p in original.parameters()), value.dtype)
        return torch.empty_like(value, device="meta", dtype=dtype if value.is_floating_point() else value.dtype)

    def fill(value: Nest) -> Nest:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = hidden.dtype if value.is_floating_point() else value.dtype
        return torch.zeros(value.shape, dtype=dtype, device=hidden.device)  # each of its own: some write into them

    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        args, kwargs = pytree.tree_map(to_meta, (args, kwargs))
        return pytree.tree_map(fill, original(*args, **kwargs))
