"""Feed: micro-batches for the ranks at the ends of a pipeline.

Both ends of a bidirectional pipeline read the same stream of M batches `(inputs, labels)`. Each takes the inputs of the
micro-batches that enter there and the labels of those that leave there. On an accelerator they are copied from pinned
memory beside the computation, one micro-batch ahead of their use.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ...comm.device import InTurn, Side
from ...comm.nest import Nest
from ...errors import ConfigError
from ..placing.grid import Place
from .shards import Shards

#: A value on the device or on its way there; the event behind the copy, before which it holds no data.
_Copy = tuple[Nest, torch.Event | None]


class BatchFeed:
    """The micro-batches of one batch on one rank, read as they are asked for.

    Args:
        place: the rank's place.
        num_micro: micro-batches of the batch.
        next_batch: reads the next `(inputs, labels)`.
        device: where the tensors go.
        side: copies to it; None: in turn, as on the CPU.
        input_gradient: let floating-point inputs require a gradient.
        fingerprint: keep a checksum of everything that is read.
        shards: cuts the sequences that are read; None: they stay whole.
    """

    def __init__(
        self,
        place: Place,
        num_micro: int,
        next_batch: Callable[[], Nest],
        device: torch.device,
        *,
        side: Side | InTurn | None = None,
        input_gradient: bool = False,
        fingerprint: bool = False,
        shards: Shards | None = None,
    ) -> None:
        placement, last = place.placement, place.placement.num_stages - 1
        self._feeds, self._directions = place.feeds, placement.num_directions
        # by direction: whether its inputs enter here, and whether its labels are needed here
        self._enters = [placement.rank(0, direction) == place.rank for direction in range(self._directions)]
        self._leaves = [placement.rank(last, direction) == place.rank for direction in range(self._directions)]
        self._num_micro = num_micro
        self._next_batch = next_batch
        self._device = device
        self._side = InTurn() if side is None else side
        self._input_gradient = input_gradient
        self._fingerprint = fingerprint
        self._shards = shards
        self._read = 0
        self._inputs: dict[int, _Copy] = {}
        self._labels: dict[int, _Copy] = {}
        self.checksum = 0

    def inputs(self, micro: int) -> Nest:
        return self._take(self._inputs, micro)

    def labels(self, micro: int) -> Nest:
        return self._take(self._labels, micro)

    def _take(self, held: dict[int, _Copy], micro: int) -> Nest:
        self._read_until(micro)
        value, arrived = held.pop(micro)
        if arrived is not None:
            _follow(value, arrived)
        if self._side.ahead:  # what this rank takes next travels while this is computed
            self._read_until(min(micro + self._directions, self._num_micro - 1))
        return value

    def drain(self) -> None:
        """Read what is left of the batch, so that both ends leave the stream at the same place."""
        if self._feeds:
            self._read_until(self._num_micro - 1)

    def _read_until(self, micro: int) -> None:
        while self._read <= micro:
            batch = self._next_batch()
            if self._fingerprint:
                self.checksum = _checksum(batch, self.checksum)
            number = self._read
            self._read += 1
            if type(batch) is not tuple or len(batch) < 2 or not isinstance(batch[0], torch.Tensor):
                _check_batch(batch, number)
            inputs, labels = batch[0], batch[1]
            if self._shards is not None:
                inputs, labels = self._shards.cut(inputs, labels)
            direction = number % self._directions
            if self._enters[direction]:
                self._inputs[number] = self._side.begin(self._move, inputs, True)
            if self._leaves[direction]:
                self._labels[number] = self._side.begin(self._move, labels, False)

    def _move(self, value: Nest, copy: bool) -> Nest:
        """Onto the device; inputs as a copy, because layers may work in place. Lists become tuples, as in DeepSpeed."""

        def move(leaf: Nest) -> Nest:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            leaf = self._side.to_device(leaf.detach(), self._device, copy)
            if copy and self._input_gradient and leaf.is_floating_point():
                leaf.requires_grad_()
            return leaf

        if isinstance(value, torch.Tensor):
            return move(value)
        return pytree.tree_map(move, tuple(value) if isinstance(value, list) else value)


def _follow(value: Nest, arrived: torch.Event) -> None:
    """Let the current stream wait for a copy to the device; the host does not."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):  # the memory belongs to the stream of the copy
            current = torch.accelerator.current_stream(leaf.device)
            current.wait_event(arrived)
            leaf.record_stream(current)


def _check_batch(batch: Nest, micro: int) -> None:
    """Refuse what is no pair of inputs and labels.

    Raises:
        ConfigError: it is not.
    """
    if (
        isinstance(batch, (Mapping, torch.Tensor, np.ndarray, str))
        or not hasattr(batch, "__getitem__")
        or len(batch) < 2
    ):
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


def _checksum(batch: Nest, start: int) -> int:
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


def check_shared_stream(checksums: list[int]) -> None:
    """Compare what the pipelines have read that share each sequence.

    Args:
        checksums: of one end of each.

    Raises:
        ConfigError: they differ.
    """
    if len(set(checksums)) > 1:
        raise ConfigError(
            f'the {len(checksums)} replicas that share each sequence ("sequence_parallel_size") read different data: '
            "shard by engine.data_rank of engine.data_replicas, which count them as one, or pass training_data to "
            "initialize"
        )
