"""Outputs of the last stage on their way to who asks for them, as tensors: only their shapes are pickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from dualpipe_engine.comm.from_all import from_all
from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.errors import ConfigError

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine


def collect(kept: Mapping[int, Nest], engine: DualPipeEngine) -> Nest:
    """The outputs of a batch on the rank `engine.place.has_outputs`; None on the others. Collective over a pipeline.

    Args:
        kept: outputs [rows, ...] of the micro-batches that ended on this rank, by their numbers.
        engine: whose pipeline it is; under a bidirectional schedule micro-batches end on two ranks.

    Raises:
        ConfigError: an output has no rows to be joined along, or none of tokens where sequences are shared.
    """
    group, target, here = engine._pipeline_group, engine.place.has_outputs, engine.global_rank
    said = from_all((here, {micro: _outline(nest) for micro, nest in kept.items()}), group)
    owners = {micro: (owner, outline) for owner, outlines in said for micro, outline in outlines.items()}
    forms = [leaf for _, outline in owners.values() for leaf in pytree.tree_leaves(outline)]
    if any(isinstance(leaf, _Form) and not leaf.shape for leaf in forms):
        raise ConfigError(
            "an output of the model or of compute_loss is a number, not a tensor of rows: leave it out of the outputs, "
            "or name it in ignore_keys",
            everywhere=True,
        )
    if engine.sharing.group is not None and any(isinstance(leaf, _Form) and len(leaf.shape) < 2 for leaf in forms):
        raise ConfigError(
            'an output of a model with "sequence_parallel_size" must be of single tokens, [rows, length, ...], so that '
            "those of parts can be joined: let the last layer return none for a whole row",
            everywhere=True,
        )
    parts = []
    for micro, (owner, outline) in sorted(owners.items()):
        if owner != target and here == owner:
            for leaf in _tensors(kept[micro]):
                dist.send(_bytes(leaf), dst=target, group=group)
        elif owner != target and here == target:
            parts.append(_received(outline, engine.device, partial(dist.recv, src=owner, group=group)))
        elif here == target:
            parts.append(kept[micro])
    return _joined(parts) if parts else None


def share(nest: Nest, engine: DualPipeEngine) -> Nest:
    """A nest of `engine.place.has_outputs` on all ranks of its pipeline. Collective over the pipeline."""
    group, source = engine._pipeline_group, engine.place.has_outputs
    box: list[Any] = [_outline(nest) if engine.global_rank == source else None]
    dist.broadcast_object_list(box, src=source, group=group)
    if engine.global_rank == source:
        for leaf in _tensors(nest):
            dist.broadcast(_bytes(leaf), src=source, group=group)
        return nest
    return _received(box[0], engine.device, partial(dist.broadcast, src=source, group=group))


def of_whole_sequences(nest: Nest, engine: DualPipeEngine) -> Nest:
    """Outputs of whole sequences [rows, length, ...] from those of parts, on the ranks `engine.place.has_outputs` of
    the pipelines that share them; None on the others. Collective over those ranks."""
    group = engine.sharing.group
    if group is None or engine.global_rank != engine.place.has_outputs:
        return nest

    def whole(mine: Nest) -> Nest:
        if not isinstance(mine, torch.Tensor):
            return mine
        parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(engine.sharing.size)]
        dist.all_gather([_bytes(part) for part in parts], _bytes(mine), group=group)
        return torch.cat(parts, dim=1)

    return pytree.tree_map(whole, nest)


class _Form:
    """What stands for a tensor in an outline: shape and dtype."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


def _outline(nest: Nest) -> Nest:
    return pytree.tree_map(lambda leaf: _Form(leaf) if isinstance(leaf, torch.Tensor) else leaf, nest)


def _tensors(nest: Nest) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes [n]; gloo knows few dtypes."""
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _received(outline: Nest, device: torch.device, fill: Callable[[torch.Tensor], object]) -> Nest:
    def receive(leaf: Nest) -> Nest:
        if not isinstance(leaf, _Form):
            return leaf
        tensor = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
        fill(tensor.view(-1).view(torch.uint8))
        return tensor

    return pytree.tree_map(receive, outline)


def _joined(parts: list[Nest]) -> Nest:
    def join(*leaves: Nest) -> Nest:
        return torch.cat(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0]

    return pytree.tree_map(join, *parts)
