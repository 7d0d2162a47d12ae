"""Exchanges of attention between ranks that share sequences, in layers that can offer them as phases."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch.distributed as dist
from deepspeed.pipe import PipelineModule

from .module import numbered_layers


@runtime_checkable
class Exchanging(Protocol):
    """A layer whose attention has been given parts of sequences."""

    def offer_exchanges(self, group: dist.ProcessGroup) -> str | None:
        """Let the exchanges of its attention be phases. Collective.

        Args:
            group: the ranks that hold the same layer, which must all agree.

        Returns:
            Why they cannot; None if they are, or there are none.
        """


def overlap_exchanges(module: PipelineModule, group: dist.ProcessGroup) -> dict[int, str]:
    """Let layers offer the exchanges of their attention as phases. Collective.

    Layers that are computed again as a whole do not: what transfers deliver would be kept from forward to backward.

    Args:
        module: whose ranks share sequences, placed or not.
        group: the replicas of this rank.

    Returns:
        Number of a layer -> why it waits for them.
    """
    reasons = {}
    for number, _ in numbered_layers(module):
        layer = module._modules.get(str(number))
        if not isinstance(layer, Exchanging):
            continue
        if module.activation_checkpoint_interval > 0 and module._is_checkpointable([layer]):
            reasons[number] = 'it is computed again as a whole: name modules in "recompute" in its place'
        elif (why := layer.offer_exchanges(group)) is not None:
            reasons[number] = why
    return reasons
