"""The loss of a Trainer of a model with routers, whose auxiliary loss is a part of it.

The other part is a sum over the labels of the batch, or a mean that micro-batches weight by theirs (`loss.py`). The
auxiliary loss is neither: each micro-batch has its own, and of the batch it is their mean, the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dualpipe_engine.comm.nest import Nest

from .batches import Model
from .loss import Computing, Loss, StandIn, TrainerLoss


class RoutedLoss(TrainerLoss):
    """`loss((logits, auxiliary loss), (inputs, numbers))` of a micro-batch.

    Args:
        trainer: as of `TrainerLoss`, as are `model` and `own`.
        weight: of the auxiliary loss.
        stand_in: makes the model that `compute_loss` is given; as `StandIn`.
    """

    def __init__(
        self,
        trainer: Computing,
        model: Model,
        own: Loss | None,
        weight: float,
        stand_in: Callable[..., StandIn] = StandIn,
    ) -> None:
        super().__init__(trainer, model, own, self._routed)
        self._weight, self._plain = weight, stand_in
        self._asking = False

    def __call__(self, output: Nest, labels: tuple[dict[str, Any], torch.Tensor]) -> torch.Tensor:
        logits, self._auxiliary = output
        self._numbers = labels[1]
        return super().__call__(logits, labels)

    def _routed(self, *given: Any) -> StandIn:
        """Whose auxiliary loss is divided by what the loss of the micro-batch is multiplied with."""
        made = self._plain(*given)
        factor = self._factor(self._numbers) or 1.0
        made.auxiliary = (self._weight, self._auxiliary / factor * (not self._asking))
        return made

    def _without_labels(self, output: Nest) -> torch.Tensor:
        return super()._without_labels(output) + self._weight * self._auxiliary

    def _asked(self, *given: Any) -> float:
        self._asking = True
        try:
            return super()._asked(*given)
        finally:
            self._asking = False
