"""Batches of a Trainer as micro-batches of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from dualpipe_engine.errors import ConfigError

Model: TypeAlias = Any
"""A model of transformers, or a PEFT model around one."""
Batch: TypeAlias = dict[str, Any]
"""What a collator of a Trainer returns: tensors [rows, ...] by the names of the model's inputs."""


def rows_of(batch: Mapping[str, Any]) -> int:
    """Rows of a batch.

    Raises:
        ConfigError: it has no tensors, or tensors with different numbers of rows.
    """
    rows = {name: len(value) for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    if len(set(rows.values())) != 1:
        told = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise ConfigError(
            f"a batch is cut by its rows, but its tensors have different numbers of rows ({told}): let the data "
            "collator give each of them one row a sample; patches of images, as of Qwen-VL, have none"
        )
    return next(iter(rows.values()))


def is_column(value: object) -> bool:
    """Whether it is a list of something else than tensors, such as names of samples."""
    return isinstance(value, list) and not any(isinstance(each, torch.Tensor) for each in value)


def split_batch(batch: Mapping[str, Any], num_micro: int) -> list[dict[str, Any]]:
    """Cut a batch into micro-batches.

    Args:
        batch: tensors [rows, ...] and lists of as many strings or numbers; padding-free batches of one row cannot be
            cut. Position ids may be [1, ...], those of all rows.
        num_micro: micro-batches, fewer where there are fewer rows. Sizes differ by at most one row.

    Raises:
        ConfigError: see `rows_of`.
    """
    shared = {"position_ids", "cache_position"}
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
    alike = {name for name, value in tensors.items() if name in shared and len(value) == 1}
    total = rows_of({name: value for name, value in tensors.items() if name not in alike})
    count = min(num_micro, total)
    parts: dict[str, Any] = {name: value.tensor_split(count) for name, value in tensors.items() if name not in alike}
    rows = [each.tolist() for each in torch.arange(total).tensor_split(count)]
    for name, value in batch.items():
        if is_column(value) and len(value) == total:
            parts[name] = [value[each[0] : each[-1] + 1] for each in rows]
    rest = {name: value for name, value in batch.items() if name not in parts and value is not None}
    return [{name: pieces[index] for name, pieces in parts.items()} | rest for index in range(count)]
