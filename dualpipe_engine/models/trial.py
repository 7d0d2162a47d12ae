"""Trial runs of layers, which show whether two ways to run one do the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..comm.nest import Nest


@contextmanager
def unchanged(layer: nn.Module) -> Iterator[None]:
    """Put buffers and random generators back after the body."""
    buffers = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    with torch.random.fork_rng():
        yield
    for buffer, before in buffers:
        if not torch.equal(buffer, before):
            buffer.copy_(before)


@contextmanager
def having(of: object, name: str, value: object) -> Iterator[None]:
    """Let an attribute, which there is, have another value in the body."""
    before = getattr(of, name)
    setattr(of, name, value)
    try:
        yield
    finally:
        setattr(of, name, before)


def hidden_state(layer: nn.Module, width: int) -> Tensor:
    """A hidden state `[2, 3, width]`, of the dtype and on the device of the layer; the same on all ranks."""
    like = next(param for param in layer.parameters() if param.is_floating_point())
    generator = torch.Generator().manual_seed(11)
    return torch.randn(2, 3, width, generator=generator).to(like.device, like.dtype)


def same(one: Nest, other: Nest) -> bool:
    """Whether two results have one structure, and the same values to the last bit."""
    ours, theirs = pytree.tree_flatten(one), pytree.tree_flatten(other)
    if ours[1] != theirs[1]:
        return False
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(ours[0], theirs[0], strict=True)
    )
