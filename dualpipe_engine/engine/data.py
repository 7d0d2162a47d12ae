"""Feed: micro-batches for the ranks at the ends of a pipeline.

Both ends of a bidirectional pipeline read the same stream of M batches `(inputs, labels)`. Each takes the inputs of the
micro-batches that enter there and the labels of those that leave there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..errors import ConfigError
from .grid import Place


class BatchFeed:
    """The micro-batches of one batch on one rank, read as they are asked for.

    Args:
        place: the rank's place.
        num_micro: micro-batches of the batch.
        next_batch: reads the next `(inputs, labels)`.
        device: where the tensors go.
        input_gradient: let floating-point inputs require a gradient.
        fingerprint: keep a checksum of everything that is read.
    """

    def __init__(
        self,
        place: Place,
        num_micro: int,
        next_batch: Callable[[], Any],
        device: torch.device,
        *,
        input_gradient: bool = False,
        fingerprint: bool = False,
    ) -> None:
        self._place = place
        self._num_micro = num_micro
        self._next_batch = next_batch
        self._device = device
        self._input_gradient = input_gradient
        self._fingerprint = fingerprint
        self._read = 0
        self._inputs: dict[int, Any] = {}
        self._labels: dict[int, Any] = {}
        self.checksum = 0

    def inputs(self, micro: int) -> Any:
        self._read_until(micro)
        return self._inputs.pop(micro)

    def labels(self, micro: int) -> Any:
        self._read_until(micro)
        return self._labels.pop(micro)

    def drain(self) -> None:
        """Read what is left of the batch, so that both ends leave the stream at the same place."""
        if self._place.feeds:
            self._read_until(self._num_micro - 1)

    def _read_until(self, micro: int) -> None:
        place, last = self._place, self._place.placement.num_stages - 1
        while self._read <= micro:
            batch = self._next_batch()
            if self._fingerprint:
                self.checksum = _checksum(batch, self.checksum)
            number = self._read
            self._read += 1
            _check_batch(batch, number)
            if place.placement.rank_of(0, number) == place.rank:
                self._inputs[number] = self._move(batch[0], copy=True)
            if place.placement.rank_of(last, number) == place.rank:
                self._labels[number] = self._move(batch[1], copy=False)

    def _move(self, value: Any, copy: bool) -> Any:
        """Onto the device; inputs as a copy, because layers may work in place. Lists become tuples, as in DeepSpeed."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            leaf = leaf.detach().to(self._device, copy=copy)
            if copy and self._input_gradient and leaf.is_floating_point():
                leaf.requires_grad_()
            return leaf

        if isinstance(value, torch.Tensor):
            return move(value)
        return pytree.tree_map(move, tuple(value) if isinstance(value, list) else value)


def _check_batch(batch: Any, micro: int) -> None:
    """Refuse what is no pair of inputs and labels.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(batch, Mapping) or not hasattr(batch, "__getitem__") or len(batch) < 2:
        size = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
        raise ConfigError(
            f"micro-batch {micro} is a {type(batch).__name__}{size}, but must be a pair (inputs, labels): let the "
            "loader make pairs, or say where they are: "
            'engine.set_batch_fn(lambda batch: (batch["inputs"], batch["labels"]))'
        )
    if isinstance(batch[0], np.ndarray):
        raise ConfigError(
            f"the inputs of micro-batch {micro} are an array of numpy, but must be tensors: let the loader call "
            "torch.from_numpy"
        )


def _checksum(batch: Iterable[Any], start: int) -> int:
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            raw = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            start = zlib.crc32(raw, start)
    return start


def check_same_stream(checksums: dict[int, int]) -> None:
    """Compare what the ends of one pipeline have read.

    Args:
        checksums: pipeline rank -> checksum.

    Raises:
        ConfigError: they differ.
    """
    if len(set(checksums.values())) > 1:
        ranks = " and ".join(map(str, sorted(checksums)))
        raise ConfigError(
            f"pipeline ranks {ranks} read different data, but the ends of one pipeline must read the same stream: "
            "shard by engine.data_rank of engine.data_replicas, not by data-parallel ranks, or pass "
            "training_data to initialize"
        )
