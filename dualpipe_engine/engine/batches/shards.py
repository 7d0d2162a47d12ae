"""Shards: the part of each sequence that a rank computes, and what its loss counts for that of the whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...comm.nest import Nest
from ...errors import ConfigError

IGNORED = -100  #: labels that do not count, as in torch's cross entropy


class ShardLabels(NamedTuple):
    """Labels of a shard.

    Args:
        labels: [batch, length / S]; where none of them counts, all are 0, so that their mean loss is a number.
        weight: of that mean, so that the mean over the shards is the mean over the labels of whole sequences (scalar).
    """

    labels: Tensor
    weight: Tensor


class Shards:
    """Cuts micro-batches of whole sequences along their length.

    Args:
        size: S, into how many parts.
        rank: which one this rank has.
    """

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def cut(self, inputs: Nest, labels: Nest) -> tuple[Nest, ShardLabels]:
        """The part of this rank of one micro-batch.

        Args:
            inputs: tensors `[batch, length, ...]` are cut, those of one dimension or none are not.
            labels: [batch, length], one for each token.

        Raises:
            ConfigError: they are no sequences, or S does not divide their length.
        """
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            raise ConfigError(
                '"sequence_parallel_size" cuts one label for each token: let the loader give labels as one tensor of '
                "whole numbers, [batch, length]"
            )
        length = labels.shape[1]
        if length % self._size:
            raise ConfigError(
                f'sequences of {length} tokens cannot be cut by "sequence_parallel_size": {self._size}: pad them to a '
                f"multiple of {self._size}, with labels of {IGNORED}"
            )
        mine = self._part(labels)
        counted = (mine != IGNORED).sum()
        weight = self._size * counted.double() / (labels != IGNORED).sum()
        own = pytree.tree_map(lambda leaf: self._cut_input(leaf, length), inputs)
        return own, ShardLabels(torch.where(counted == 0, torch.zeros_like(mine), mine), weight)

    def _cut_input(self, leaf: Nest, length: int) -> Nest:
        if not isinstance(leaf, Tensor) or leaf.dim() < 2:
            return leaf
        if leaf.shape[1] != length:
            raise ConfigError(
                f"an input of shape {list(leaf.shape)} cannot be cut with labels of {length} tokens: inputs must be "
                "[batch, length, ...], or have one dimension"
            )
        return self._part(leaf)

    def _part(self, whole: Tensor) -> Tensor:
        each = whole.shape[1] // self._size
        return whole[:, self._rank * each : (self._rank + 1) * each].contiguous()


def of_shards(loss_fn: Callable[..., Tensor]) -> Callable[[Nest, ShardLabels], Tensor]:
    """A loss of whole sequences from the mean over the labels of a shard that are not `IGNORED`."""

    def of_shard(output: Nest, shard: ShardLabels) -> Tensor:
        loss = loss_fn(output, shard.labels)
        return loss * shard.weight.to(loss.dtype)

    return of_shard
