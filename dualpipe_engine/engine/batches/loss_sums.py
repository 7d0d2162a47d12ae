"""Totals: what one collective tells every rank of a batch, on the way while the optimizer waits for gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...schedule.progress import waiting


class Total(NamedTuple):
    """Of one batch, the same on every rank but for `pipeline_loss`; scalar tensors.

    Args:
        loss: mean over micro-batches and replicas.
        pipeline_loss: mean over the micro-batches of this replica.
        bad: how many notes of `Borders` hold a NaN or an inf.
        balance: 0 if the copies of all stages have said the same.
        signals: on how many ranks the signal of `SaveOnSignal` has come.
    """

    loss: Tensor
    pipeline_loss: Tensor
    bad: Tensor
    balance: Tensor
    signals: Tensor


class Totals:
    """Sums over all ranks.

    Args:
        groups: process groups of this rank's pipeline, of its peers in the other replicas, and of its peers in tensor
            parallelism.
        device: of the sums.
        signals: 1 if a signal has come on this rank (`SaveOnSignal`), else 0.
    """

    def __init__(
        self,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup, dist.ProcessGroup],
        device: torch.device,
        signals: Callable[[], int],
    ) -> None:
        self._pipeline, *others = groups
        self._replicas, self._tensor_parallel = (None if dist.get_world_size(each) == 1 else each for each in others)
        self._device, self._signals = device, signals

    def start(
        self,
        losses: Mapping[int, Tensor],
        num_micro: int,
        bad: Tensor | None = None,
        balance: int = 0,
    ) -> None:
        """Send this rank's part on its way. Collective over the ranks of a pipeline.

        Args:
            losses: of the micro-batches that end on this rank.
            num_micro: micro-batches of the batch.
            bad: what `Borders.bad` says; None: nothing was looked at.
            balance: an integer that adds up to 0 over the copies of a stage where these agree (`TrainedParams`).
        """
        with torch.no_grad():
            self._sums = torch.zeros(4, dtype=torch.float64, device=self._device)  # so that the order does not show
            if losses:
                self._sums[0] = torch.stack(list(losses.values())).sum(dtype=torch.float64)
            if bad is not None:
                self._sums[1] = bad
            if balance:
                self._sums[2] = balance
            if signals := self._signals():
                self._sums[3] = signals
            self._num_micro = num_micro
            self._work = dist.all_reduce(self._sums, group=self._pipeline, async_op=True)
        self._total: Total | None = None

    def finish(self) -> Total:
        """The sums. Collective over all ranks at the first call after `start`."""
        if self._total is None:
            with torch.no_grad():
                with waiting():
                    self._work.wait()
                pipeline_loss = self._sums[0] / self._num_micro
                means = torch.stack([pipeline_loss, *self._sums[1:]])
                if self._replicas is not None:
                    dist.all_reduce(means, group=self._replicas)
                    means[0] /= dist.get_world_size(self._replicas)
                if self._tensor_parallel is not None:
                    dist.all_reduce(means[1:], group=self._tensor_parallel)
                self._total = Total(means[0].float(), pipeline_loss.float(), means[1], means[2], means[3])
        return self._total
