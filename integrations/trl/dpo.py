"""DualPipeDPOTrainer: TRL's DPOTrainer on a pipeline of stages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import PredictionOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.errors import ConfigError

from ..transformers.batches import Batch, Model
from ..transformers.loss import with_weights
from .batch_metrics import BatchMetrics
from .fused import fused

#: Losses that are no mean over pairs: micro-batches do not add up to the batch.
OVER_THE_BATCH = {"aot", "aot_unpaired", "sft"}


class DualPipeDPOTrainer(BatchMetrics, DPOTrainer):
    """Direct preference optimization with TRL: losses and metrics are those of its DPOTrainer.

    The log-probabilities of the reference, which is the model as it is given, are computed on the stages when the
    trainer is made. A micro-batch has pairs: chosen rows, then rejected ones.

    Args:
        model: as for `DualPipeTrainer`.
        ref_model: refused.
        args: with `precompute_ref_log_probs=True`.
        options: as for `DPOTrainer` and `DualPipeTrainer`.

    Raises:
        ConfigError: as for `DualPipeTrainer`; what `docs/trainer.md` lists as refused.
    """

    eval_dataset: Any
    train_dataset: Any
    _trl = DPOTrainer
    _for_the_loss = ("labels", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")

    def __init__(
        self, model: Model, ref_model: PreTrainedModel | None = None, args: DPOConfig | None = None, **options: Any
    ) -> None:
        if args is None or not args.precompute_ref_log_probs:
            raise ConfigError("a second model beside the stages is not there: use precompute_ref_log_probs=True")
        if ref_model is not None:
            raise ConfigError("the reference is the model as it is given: leave ref_model out, or start from it")
        if options.get("peft_config") is not None or hasattr(model, "get_base_model"):
            raise ConfigError("the reference of a PEFT model is not on the stages: train the whole model, or by SFT")
        if options.get("compute_metrics") is not None:
            raise ConfigError("compute_metrics has no logits of pairs here: use the metrics that TRL logs")
        if OVER_THE_BATCH & set(args.loss_type) and options.get("num_chunks", 8) > 1:
            raise ConfigError(f"loss_type={args.loss_type} is no mean over pairs: use num_chunks=1")
        self._made = False
        super().__init__(model, args, **options)
        self._made = True
        rows = self.args.precompute_ref_batch_size
        add = partial(self._precompute_ref_logps, batch_size=rows or self.args.per_device_train_batch_size)
        self.train_dataset = add(self.train_dataset, "train")
        add = partial(self._precompute_ref_logps, batch_size=rows or self.args.per_device_eval_batch_size)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: add(dataset, name) for name, dataset in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = add(self.eval_dataset, "eval")

    def predict(self, *args: Any, **options: Any) -> PredictionOutput:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError("predict has no logits of pairs here: use evaluate, or a DualPipeTrainer")

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if not self._made:
            return dataset  # there is no engine yet
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        columns: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        for batch in self._prepare_loader(1, 0, loader):
            found = self.compute_ref_log_probs(self._reference, self._prepare_inputs(batch))
            for column, logs in zip(columns.values(), found, strict=True):
                column += logs.tolist()
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _reference(self, *, labels: torch.Tensor, **inputs: Any) -> FusedCausalLMOutput:
        """Log-probabilities of the tokens of a batch, on the stages. Collective."""
        engine = self._make_engine()
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        micros = with_weights(self._split(tensors | {"labels": labels}), None)

        def logs(output: Nest, given: Mapping[str, Any]) -> Nest:
            return {"log_probs": fused(output, given["labels"]).log_probs}

        with self._loss.evaluating(False, False, keep=logs) as kept:
            engine.eval_batch(iter(micros), num_micro_batches=len(micros))
        return FusedCausalLMOutput(**(self._together(kept, len(labels)) or {}))

    def _rows_of(self, inputs: Batch) -> int:
        return len(inputs["input_ids"]) // 2

    def _labels_of(self, inputs: Batch) -> tuple[bool, Nest]:
        return True, None

    def _split(self, inputs: Batch) -> list[Batch]:
        pairs = max(len(value) for value in inputs.values()) // 2
        count = min(self._num_chunks, pairs)

        def cut(value: torch.Tensor) -> list[torch.Tensor]:
            parts = [half.tensor_split(count) for half in (value.chunk(2) if len(value) > pairs else (value,))]
            return [torch.cat(each) for each in zip(*parts, strict=True)]

        cuts = {name: cut(value) for name, value in inputs.items()}
        return [{name: parts[at] for name, parts in cuts.items()} for at in range(count)]
