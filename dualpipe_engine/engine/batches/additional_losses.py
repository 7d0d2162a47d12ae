"""Losses that a PipelineModule reports beside the one that it trains on (`PipelineModule.get_additional_losses`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule

from ...comm.from_all import from_all
from ...comm.nest import Nest


class AdditionalLosses:
    """Adds up what the module reports after the loss of each micro-batch.

    Args:
        module: the placed module; one that does not override `get_additional_losses` costs nothing.
        pipeline: process group of the pipeline's ranks.
        replicas: process group of this rank's peers in the other replicas.
    """

    def __init__(self, module: PipelineModule, pipeline: dist.ProcessGroup, replicas: dist.ProcessGroup) -> None:
        self._module = module
        self._groups = (pipeline, replicas)
        method = getattr(module.get_additional_losses, "__func__", None)
        self._reports = method is not PipelineModule.get_additional_losses
        self._sums: dict[str, torch.Tensor] = {}

    def watch(self, loss_fn: Callable[..., torch.Tensor] | None) -> Callable[..., torch.Tensor] | None:
        """`loss_fn`, followed by a look at what the module reports."""
        if not self._reports:
            return loss_fn

        def watched(output: Nest, *labels: Nest) -> torch.Tensor:
            loss: torch.Tensor = output if loss_fn is None else loss_fn(output, *labels)
            for name, value in (self._module.get_additional_losses() or {}).items():
                value = value.detach().double()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
            return loss

        return watched

    def begin(self) -> None:
        """Start of a batch."""
        self._sums.clear()

    def mean(self, num_micro: int, device: torch.device) -> OrderedDict[str, torch.Tensor] | None:
        """Mean of each over micro-batches and replicas, the same on every rank; None if there are none.

        Collective over all ranks, for a module that reports.
        """
        if not self._reports:
            return None
        totals: dict[str, float] = {name: float(value) / num_micro for name, value in self._sums.items()}
        for group, share in zip(self._groups, (1, dist.get_world_size(self._groups[1])), strict=True):
            totals_of_ranks = from_all(totals, group)
            names = dict.fromkeys(name for each in totals_of_ranks for name in each)
            totals = {name: sum(each.get(name, 0.0) for each in totals_of_ranks) / share for name in names}
        means = OrderedDict((name, torch.tensor(value, device=device)) for name, value in totals.items())
        return means or None
