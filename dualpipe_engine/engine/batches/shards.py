"""Shards: the part of each sequence that a rank computes, and what its loss counts for that of the whole sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...comm.nest import Nest
from ...errors import ConfigError
from ..given import LossFunction
from ..placing.loss import replace_loss
from ..placing.sequences import Sharing

IGNORED = -100  #: labels that do not count, as in torch's cross entropy
_SHOWN = 16  # shards that show whether a loss is a mean: some label of another kind that it ignores may be among them


class LabelsAndMore(NamedTuple):
    """Labels of whole sequences, and what a loss is told beside them.

    Args:
        labels: [batch, length].
        more: goes to the loss as it is.
    """

    labels: Nest
    more: Nest


class ShardLabels(NamedTuple):
    """Labels of a shard.

    Args:
        labels: [batch, length / S]; where none of them counts, all are 0, so that their mean loss is a number.
        weight: of that mean, so that the mean over the shards is the mean over the labels of whole sequences (scalar).
        whole: [batch, length], those of whole sequences.
        start: place of the first label of the shard in them.
        more: that of `LabelsAndMore`.
    """

    labels: Tensor
    weight: Tensor
    whole: Tensor
    start: int
    more: Nest = None

    def further(self, places: int) -> Tensor:
        """The labels so many places on, `[batch, length / S]`; those behind the end do not count."""
        found = self.whole[:, self.start + places :][:, : self.labels.shape[1]]
        return nn.functional.pad(found, (0, self.labels.shape[1] - found.shape[1]), value=IGNORED)

    def of_mean(self) -> Tensor:
        """What a sum over labels is multiplied with, so that the mean over the shards is that of `weight` (scalar)."""
        return self.whole.shape[1] // self.labels.shape[1] / (self.whole != IGNORED).sum().double()


PartLoss: TypeAlias = Callable[[Nest, ShardLabels], Tensor]
"""Of the output of a shard: its share of the loss of whole sequences (scalar)."""


@runtime_checkable
class SequenceLoss(Protocol):
    """A loss function that knows parts of sequences by itself.

    Attributes:
        shifts: whether the labels of whole sequences are those of the tokens themselves, not of the next ones.
    """

    @property
    def shifts(self) -> bool: ...

    def of_parts(self) -> PartLoss:
        """The same, of labels of the next tokens."""


class Shards:
    """Cuts micro-batches of whole sequences along their length.

    Args:
        size: S, into how many parts.
        rank: which one this rank has.
        inputs: whether inputs are cut, too; else the first layer does that.
        shifts: whether labels are those of the tokens themselves; parts have those of the next ones.
    """

    def __init__(self, size: int, rank: int, inputs: bool = True, shifts: bool = False) -> None:
        self._size, self._rank, self._inputs, self._shifts = size, rank, inputs, shifts

    def cut(self, inputs: Nest, labels: Nest) -> tuple[Nest, ShardLabels]:
        """The part of this rank of one micro-batch.

        Args:
            inputs: tensors `[batch, length, ...]` are cut, those of one dimension or none are not.
            labels: [batch, length], one for each token; or `LabelsAndMore`.

        Raises:
            ConfigError: they are no sequences, or S does not divide their length.
        """
        labels, more = labels if isinstance(labels, LabelsAndMore) else (labels, None)
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
        labels = next_tokens(labels) if self._shifts else labels
        mine = self._part(labels)
        counted = (mine != IGNORED).sum()
        weight = self._size * counted.double() / (labels != IGNORED).sum()
        if self._inputs:
            inputs = pytree.tree_map(lambda leaf: self._cut_input(leaf, length), inputs)
        mine = torch.where(counted == 0, torch.zeros_like(mine), mine)
        return inputs, ShardLabels(mine, weight, labels, self._rank * mine.shape[1], more)

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


def shard_batches(module: PipelineModule, sharing: Sharing) -> Shards | None:
    """What cuts the micro-batches of this rank, if it shares its sequences; the loss of the module is then of parts.

    Raises:
        ConfigError: the loss is known not to be one of parts.
    """
    if sharing.group is None:
        return None
    shards = Shards(sharing.size, sharing.rank, inputs=not sharing.cuts_inputs, shifts=shifts(module.loss_fn))
    replace_loss(module, of_shards(module.loss_fn))
    return shards


def next_tokens(labels: Tensor) -> Tensor:
    """Labels of the next tokens from those of the tokens themselves, `[batch, length]`; the last has none."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def shifts(loss_fn: LossFunction) -> bool:
    """Whether a loss takes labels of the tokens themselves."""
    if isinstance(loss_fn, partial):
        return shifts(loss_fn.func)
    return isinstance(loss_fn, SequenceLoss) and loss_fn.shifts


def of_shards(loss_fn: LossFunction) -> PartLoss:
    """A loss of whole sequences from parts of them: its own way, or from the mean over the labels of a shard that are
    not `IGNORED`.

    Raises:
        ConfigError: it is known not to be one. In the first batch: its halves show that it is no such mean.
    """
    if not _knows_parts(loss_fn):
        return weighed(_Mean(loss_fn))
    if isinstance(loss_fn, partial):
        return partial(of_shards(loss_fn.func), *loss_fn.args, **loss_fn.keywords)
    assert isinstance(loss_fn, SequenceLoss)
    return loss_fn.of_parts()


def _knows_parts(loss_fn: LossFunction) -> bool:
    return _knows_parts(loss_fn.func) if isinstance(loss_fn, partial) else isinstance(loss_fn, SequenceLoss)


class _Mean:
    """A loss of the user's, of which the first shards that have labels that count in both halves show whether it is the
    mean over them.

    Args:
        loss_fn: of output and labels.
    """

    def __init__(self, loss_fn: Callable[..., Tensor]) -> None:
        self._loss_fn, self._left = loss_fn, _SHOWN

    def __call__(self, output: Nest, labels: Tensor) -> Tensor:
        loss = self._loss_fn(output, labels)
        if self._left:
            self._check(output, labels, float(loss.detach()))
        return loss

    @torch.no_grad()
    def _check(self, output: Nest, labels: Tensor, loss: float) -> None:
        length = labels.shape[1]
        halves = slice(length // 2), slice(length // 2, length)
        numbers = [int((labels[:, half] != IGNORED).sum()) for half in halves]
        if not all(numbers) or not math.isfinite(loss):
            return
        self._left -= 1
        leaves = [leaf for leaf in pytree.tree_leaves(output) if _has_length(leaf, length)]
        if not leaves:
            return
        try:
            parts = [
                float(self._loss_fn(*pytree.tree_map(partial(_cut, length, half), (output, labels)))) for half in halves
            ]
        except Exception:  # it takes one length alone
            return
        mean = sum(part * number for part, number in zip(parts, numbers, strict=True)) / sum(numbers)
        precise = all(leaf.dtype not in (torch.bfloat16, torch.float16) for leaf in leaves)
        if not math.isclose(loss, mean, rel_tol=1e-3 if precise else 3e-2, abs_tol=1e-3):
            raise ConfigError(
                f'"sequence_parallel_size" weighs loss_fn by the number of labels other than {IGNORED}, but it is not '
                f"the mean over these: of a part of sequences it is {loss:.4g}, and {mean:.4g} from its halves: give "
                f"the PipelineModule a loss_fn that is, and mark other labels that do not count by {IGNORED}"
            )


def _cut(length: int, part: slice, leaf: Nest) -> Nest:
    return leaf[:, part].contiguous() if _has_length(leaf, length) else leaf


def _has_length(leaf: Nest, length: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.shape[1] == length


def weighed(loss_fn: LossFunction) -> PartLoss:
    """From the mean over the labels of a shard that are not `IGNORED`."""

    def of_shard(output: Nest, shard: ShardLabels) -> Tensor:
        loss = loss_fn(output, shard.labels)
        return loss * shard.weight.to(loss.dtype)

    return of_shard
