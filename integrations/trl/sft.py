"""DualPipeSFTTrainer: TRL's SFTTrainer on a pipeline of stages."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from dualpipe_engine.errors import ConfigError

from ..transformers.batches import Batch
from .batch_metrics import BatchMetrics


class DualPipeSFTTrainer(BatchMetrics, SFTTrainer):
    """Supervised fine-tuning with TRL: data sets, losses and metrics are those of its SFTTrainer.

    Start it with a launcher, as a `DualPipeTrainer`, whose arguments it takes beside those of `SFTTrainer`.

    Raises:
        ConfigError: as for `DualPipeTrainer`; padding-free batches, which are one row; auxiliary losses of experts.
    """

    _trl = SFTTrainer

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.padding_free:
            raise ConfigError(
                "padding-free batches are one row, which cannot be cut into micro-batches: use padding_free=False and "
                'packing_strategy="wrapped"'
            )

    def _items_of(self, inputs: Batch) -> torch.Tensor | int | None:
        return None  # TRL's evaluation takes the mean over the tokens of a batch
