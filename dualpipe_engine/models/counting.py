"""Counting: how often each expert was chosen, added up on the device while nobody waits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Counting:
    """A module that chooses experts, and counts what it chooses in training.

    Buffers stay in fp32 whatever the weights are cast to.

    Attributes:
        counts: [experts], rows that this rank has sent to each expert since the last step.
        load: [experts], the same over all copies and replicas, of the last step that somebody has asked about.
        follows: whether it asks after every step.
    """

    counts: Tensor
    load: Tensor
    training: bool
    follows = False
    _keep_in_fp32_modules_strict: tuple[str, ...] = ("counts", "load")  # DeepSpeed looks here when it casts buffers

    @torch.no_grad()
    def note(self, counts: Tensor) -> None:
        """Add `counts [experts]` of one forward, in training."""
        # Recomputation, which is part of a backward, must not count again.
        if self.training and torch._C._current_graph_task_id() == -1:
            self.counts += counts

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """Take what all copies have counted in a step, `load [experts]`."""
        self.load.copy_(load)


def counters(experts: int, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of the buffers of `Counting`, to be registered as not persistent."""
    for name in ("counts", "load"):
        yield name, torch.zeros(experts, dtype=torch.float32, device=device)
