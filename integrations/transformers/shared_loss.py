"""The loss of a Trainer whose replicas share sequences: the model's own, of the part that a rank has.

`compute_loss` sees logits of whole sequences, which no rank has. What it does without anything of the user's is known:
it takes the model's own loss, a sum over labels divided by `num_items_in_batch` or a mean over those of the batch. So
the engine cuts labels and weighs parts as it does for a loop of one's own, and each micro-batch has a factor.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from dualpipe_engine.adapters.losses import TokenLoss
from dualpipe_engine.adapters.routed import WeightedLoss
from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.engine.batches.shards import IGNORED, LabelsAndMore, PartLoss, ShardLabels, of_shards, shifts
from dualpipe_engine.engine.placing.sequences import SIZE
from dualpipe_engine.errors import ConfigError

from .batches import Batch, Model
from .loss import Computing, Loss, TrainerLoss
from .loss_kind import counted


class SharedLoss(TrainerLoss):
    """Of whole sequences, `of_parts` of which is what the last stage computes.

    Args:
        trainer: as of `TrainerLoss`, as is `model`.
        own: the model's own loss of (logits, labels).
        weight: of the auxiliary loss over routers, which then stands beside the logits; None: there is none.
    """

    def __init__(self, trainer: Computing, model: Model, own: Loss, weight: float | None) -> None:
        super().__init__(trainer, model, own)
        self._whole, self._routed = (own, False) if weight is None else (WeightedLoss(own, weight), True)
        self._is_sum = isinstance(own, TokenLoss)

    @property
    def shifts(self) -> bool:
        return shifts(self._whole)

    def of_parts(self) -> PartLoss:
        self._part_loss = of_shards(self._whole)
        return self._of_part

    def _of_part(self, output: Nest, shard: ShardLabels) -> torch.Tensor:
        factor, number = shard.more
        if self._kept is not None:
            self._kept[number] = output[0] if self._routed else output
        if not self._labelled:
            return torch.zeros((), device=factor.device)
        # of a micro-batch without labels that count the weight is 0 / 0
        return self._part_loss(output, shard._replace(weight=shard.weight.nan_to_num(0.0) * factor))

    def micros(
        self, parts: list[Batch], items: torch.Tensor | int | None, readers: int, labelled: bool = True
    ) -> list[Any]:
        """Micro-batches as pairs (inputs, labels and more).

        Args:
            parts: inputs of the micro-batches, labels among them, of whole sequences.
            items: labels that count, over all readers; None where the loss is a mean.
            readers: groups of replicas with sequences of their own, over which the engine takes the mean.
            labelled: there are labels; without, they stand for some that do not count.
        """
        counts = [counted(inputs, self.shifts) for inputs in parts]
        total = sum(counts) if items is None or not self._is_sum else float(items) / readers
        found = []
        for number, (inputs, own) in enumerate(zip(parts, counts, strict=True)):
            labels = inputs.get("labels") if labelled else self._none_counts(inputs)
            factor = torch.tensor(own * len(parts) / total if total else 0.0, dtype=torch.float64)
            kept = {name: value for name, value in inputs.items() if name != "labels"}
            found.append((kept, LabelsAndMore(labels, (factor, number))))
        return found

    def _none_counts(self, inputs: Batch) -> torch.Tensor:
        main = inputs[self._model.main_input_name]
        return torch.full(main.shape[:2], IGNORED, device=main.device)


def refuse_other_losses(trainer: Trainer) -> None:
    """Refuse a loss that is not the model's own.

    Raises:
        ConfigError: it is not.
    """
    kind = type(trainer)
    for there, name in (
        (kind.compute_loss is not Trainer.compute_loss, f"{kind.__name__}.compute_loss"),
        (trainer.compute_loss_func is not None, "compute_loss_func="),
        (trainer.label_smoother is not None, "label_smoothing_factor="),
    ):
        if there:
            raise ConfigError(
                f'{name} takes the logits of whole sequences, of which "{SIZE}" leaves a part to each rank: train on '
                f'the model\'s own loss, or leave out "{SIZE}"'
            )
