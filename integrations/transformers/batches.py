"""Batches of a Trainer as micro-batches of a pipeline, with a loss that comes out as that of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.errors import ConfigError

Model: TypeAlias = Any
"""A model of transformers, or a PEFT model around one."""
Batch: TypeAlias = dict[str, Any]
"""What a collator of a Trainer returns: tensors [rows, ...] by the names of the model's inputs."""

MicroBatch: TypeAlias = tuple[Nest, Nest]
"""(inputs, labels)"""
Loss = Callable[[Nest, Nest], torch.Tensor]


def split_batch(batch: Mapping[str, Any], num_micro: int, label_name: str = "labels") -> list[MicroBatch]:
    """Cut a batch into micro-batches (inputs, labels).

    Args:
        batch: tensors [rows, ...]; padding-free batches of one row cannot be cut.
        num_micro: micro-batches, fewer where there are fewer rows. Sizes differ by at most one row.
        label_name: of the labels among the inputs.

    Raises:
        ConfigError: there are no labels, or tensors with different numbers of rows.
    """
    if label_name not in batch:
        raise ConfigError(f"a batch has no {label_name!r}: its keys are {sorted(batch)}")
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    rows = {len(value) for value in tensors.values()}
    if len(rows) != 1:
        raise ConfigError(f"the tensors of a batch have different numbers of rows: {sorted(rows)}")
    count = min(num_micro, rows.pop())
    parts = {name: value.tensor_split(count) for name, value in tensors.items()}
    rest = {name: value for name, value in batch.items() if name not in tensors and value is not None}
    micros = []
    for index in range(count):
        inputs = {name: pieces[index] for name, pieces in parts.items()} | rest
        micros.append((inputs, inputs.pop(label_name)))
    return micros


class BatchLoss:
    """The loss of a micro-batch, scaled so that the mean over all micro-batches is the loss of the whole batch.

    Args:
        whole: `loss(output, labels)`, a mean over rows.
        of_tokens: instead `loss(output, labels, num_items)`, a sum over tokens divided by `num_items`.
    """

    def __init__(self, whole: Loss, of_tokens: Callable[[Nest, Nest, float], torch.Tensor] | None = None) -> None:
        self._whole, self._of_tokens = whole, of_tokens

    @staticmethod
    def label(micros: list[MicroBatch], items: torch.Tensor | int | None, replicas: int = 1) -> list[MicroBatch]:
        """Put what the loss needs beside the labels.

        Args:
            micros: of one replica.
            items: labels that count, over all replicas; None where the model's loss is a mean over rows.
            replicas: of the pipeline, over which the engine takes the mean.
        """
        rows = sum(len(labels) for _, labels in micros)
        count = float("nan") if items is None else float(items)
        labelled = []
        for inputs, labels in micros:
            factor = len(micros) * (len(labels) / rows if items is None else replicas)
            labelled.append((inputs, (labels, torch.tensor([factor, count], dtype=torch.float64))))
        return labelled

    def __call__(self, output: Nest, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        target, (factor, count) = labels[0], labels[1].tolist()
        if self._of_tokens is None or count != count:  # no number of items
            return self._whole(output, target) * factor
        return self._of_tokens(output, target, count) * factor
