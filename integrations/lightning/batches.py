"""Batches of Lightning as micro-batches, and the loss of one of them on the last stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch.utils import _pytree as pytree

from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.engine.batches.shards import (
    IGNORED,
    LabelsAndMore,
    PartLoss,
    ShardLabels,
    of_shards,
    shifts,
)
from dualpipe_engine.errors import ConfigError

Micro: TypeAlias = "tuple[Nest, LabelsAndMore]"
"""Inputs; targets and the number of the micro-batch."""


def inputs_and_targets(batch: Nest, names: tuple[str, ...], needed: bool = True) -> tuple[Nest, Nest]:
    """What the first layer takes of a batch, and what the loss takes.

    Args:
        batch: a pair, or a mapping; where no targets are needed, also inputs alone.
        names: of what is for the loss in a mapping.
        needed: whether there must be targets.

    Raises:
        ConfigError: it is neither, or lacks the targets.
    """
    if isinstance(batch, Mapping):
        missing = [name for name in names if name not in batch]
        if needed and missing:
            raise ConfigError(
                f"a batch with the keys {sorted(batch)} has no {missing[0]!r}: name what the loss takes in "
                "DualPipeLightningModule(targets=...)"
            )
        inputs = {name: value for name, value in batch.items() if name not in names}
        if not inputs:
            raise ConfigError(f"a batch with the keys {sorted(batch)} has nothing but targets: add the inputs")
        found = {name: batch.get(name) for name in names}
        return (
            next(iter(inputs.values())) if len(inputs) == 1 else inputs,
            next(iter(found.values())) if len(found) == 1 else found,
        )
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if needed:
        raise ConfigError(
            f"a batch must be a pair (inputs, targets) or a dict, got {type(batch).__name__}: let the loader make "
            "them, or override training_step and call pipeline_step((inputs, targets))"
        )
    return (batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch), None


def rows_of(inputs: Nest) -> int:
    """The rows of a batch: the length of its first tensor.

    Raises:
        ConfigError: there is none.
    """
    return len(_first(inputs))


def _first(inputs: Nest) -> torch.Tensor:
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf
    raise ConfigError("the inputs of a batch hold no tensor with rows: let the loader collate tensors")


def none_counts(micros: list[Micro]) -> list[Micro]:
    """The same with a label of each token that does not count, where there need not be targets.

    Args:
        micros: whose inputs begin with a tensor [rows, length, ...].
    """
    found = []
    for inputs, (_, number) in micros:
        first = _first(inputs)
        found.append((inputs, LabelsAndMore(torch.full(first.shape[:2], IGNORED, device=first.device), number)))
    return found


def split(inputs: Nest, targets: Nest, num_chunks: int) -> list[Micro]:
    """Equal micro-batches: `num_chunks`, or the most below that divide the rows.

    Returns:
        Pairs of inputs and of targets and number; lists and tuples are tuples, one of a single part is that part.

    Raises:
        ConfigError: a tensor has other rows.
    """
    rows = rows_of(inputs)
    chunks = max(count for count in range(1, min(num_chunks, rows) + 1) if rows % count == 0)
    size = rows // chunks

    def part(nest: Nest, number: int) -> Nest:
        def cut(leaf: Nest) -> Nest:
            if not isinstance(leaf, torch.Tensor) or not leaf.dim():
                return leaf
            if len(leaf) != rows:
                raise ConfigError(
                    f"a tensor of shape {list(leaf.shape)} in a batch of {rows} rows cannot be cut into micro-batches: "
                    "let every tensor have the rows of the batch in its first dimension"
                )
            return leaf[number * size : (number + 1) * size]

        found = pytree.tree_map(cut, nest)
        if isinstance(found, (list, tuple)):
            return found[0] if len(found) == 1 else tuple(found)
        return found

    return [(part(inputs, number), LabelsAndMore(part(targets, number), number)) for number in range(chunks)]


class StageLoss:
    """`loss(outputs, (targets, number))` of a micro-batch, on the last stage.

    Args:
        criterion: of the user.
    """

    def __init__(self, criterion: Callable[[Nest, Nest], torch.Tensor]) -> None:
        self._criterion = criterion
        self._kept: dict[int, Nest] | None = None

    @contextmanager
    def keeping(self) -> Iterator[dict[int, Nest]]:
        """Within, outputs are kept and losses are 0.

        Yields:
            Outputs of the micro-batches that end on this rank, by their numbers; filled as they end.
        """
        kept: dict[int, Nest] = {}
        self._kept = kept
        try:
            yield kept
        finally:
            self._kept = None

    def __call__(self, outputs: Nest, labels: LabelsAndMore) -> torch.Tensor:
        targets, number = labels
        return self._criterion(outputs, targets) if self._kept is None else self._keep(outputs, number)

    @property
    def shifts(self) -> bool:
        return shifts(self._criterion)

    def of_parts(self) -> PartLoss:
        """The same of parts of sequences, which replicas share."""
        part_loss = of_shards(self._criterion)

        def of_part(outputs: Nest, shard: ShardLabels) -> torch.Tensor:
            return part_loss(outputs, shard) if self._kept is None else self._keep(outputs, shard.more)

        return of_part

    def _keep(self, outputs: Nest, number: int) -> torch.Tensor:
        assert self._kept is not None
        self._kept[number] = outputs
        return torch.zeros(())
