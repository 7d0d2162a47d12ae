"""DualPipeSFTTrainer: TRL's SFTTrainer on a pipeline of stages."""

from __future__ import annotations

import torch
from trl import SFTTrainer

from ..transformers.batches import Batch
from .batch_metrics import BatchMetrics


class DualPipeSFTTrainer(BatchMetrics, SFTTrainer):
    """Supervised fine-tuning with TRL: data sets, losses and metrics are those of its SFTTrainer.

    Start it with a launcher, as a `DualPipeTrainer`, whose arguments it takes beside those of `SFTTrainer`.

    Raises:
        ConfigError: as for `DualPipeTrainer`; what `docs/trainer.md` lists as refused.
    """

    _stock = SFTTrainer

    def _items_of(self, inputs: Batch) -> torch.Tensor | int | None:
        return None  # TRL's evaluation takes the mean over the tokens of a batch
