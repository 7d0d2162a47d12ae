"""Nest: what the parts of a model hand on to each other: layers, stages, losses and the data loader."""

from __future__ import annotations

from typing import Any, TypeAlias

Nest: TypeAlias = Any
"""A tensor, or any nest of tensors and plain values that torch knows: tuples, named tuples, lists, dicts, and classes
that are registered with `torch.utils._pytree`. What it is the user's model decides, so that no type can say more."""


def as_it_is(value: Nest) -> Nest:
    """The value itself: for who may do something with one."""
    return value
