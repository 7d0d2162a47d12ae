"""Blocks: the memory of tensors, to be sent apart from what they belong to; tensors that overlap keep doing so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; enough for every dtype


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


def to_blocks(tensors: list[Tensor], device: torch.device) -> tuple[list[Shape], list[Tensor], list[int]]:
    """Tensors that overlap in memory share a block, each other one has its own.

    Args:
        tensors: without a graph.
        device: where layers run.

    Returns:
        The shape of each tensor; the blocks (uint8, views of the tensors' memory, or copies of those with gaps); for
        each block the number of the first tensor that lies in it.
    """
    shapes: list[Shape | None] = [None] * len(tensors)
    blocks: list[Tensor] = []
    first: list[int] = []
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
        first.append(min(members))
        for index in members:
            each = tensors[index]
            offset = int(each.storage_offset()) - start // each.itemsize
            shapes[index] = Shape(each.dtype, tuple(each.shape), each.stride(), len(blocks) - 1, offset, host)
    for index, each in enumerate(tensors):
        if each.device.type == "meta":
            shapes[index] = Shape(each.dtype, tuple(each.shape), each.stride(), None, 0, False)
    return [shape for shape in shapes if shape is not None], blocks, first


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


def in_block(shape: Shape, blocks: list[Tensor]) -> Tensor:
    """A tensor in its block."""
    if shape.block is None:
        return torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
    block = blocks[shape.block]
    tensor = torch.empty(0, dtype=shape.dtype, device=block.device)
    return tensor.set_(block.untyped_storage(), shape.offset, shape.size, shape.stride)
