"""DualPipeDPOTrainer: TRL's DPOTrainer on a pipeline of stages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import PredictionOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from dualpipe_engine import initialize
from dualpipe_engine.adapters import get_model_adapter
from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.errors import ConfigError

from ..transformers.batches import Batch, Model
from ..transformers.loss import TrainerLoss, with_weights
from ..transformers.stages import on_stages
from ..transformers.whole_model import base_model
from .batch_metrics import BatchMetrics
from .fused import fused

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine

LOGS = ("ref_chosen_logps", "ref_rejected_logps")  #: columns with log-probabilities of the reference


class DualPipeDPOTrainer(BatchMetrics, DPOTrainer):
    """Direct preference optimization with TRL: losses and metrics are those of its DPOTrainer.

    The reference is `ref_model`, or else the model as it is given, which TRL loads once more. It stands on a pipeline
    of its own, on the same ranks, which each hold one of its stages. The reference of a PEFT model is on the stages
    already: the model without its adapters, or with those that it was given with. With `precompute_ref_log_probs=True`
    and without a `ref_model` there is no second model either. A micro-batch has pairs: chosen rows, then rejected ones.

    Args:
        model: as for `DualPipeTrainer`.
        ref_model: a model that `get_model_adapter` can cut.
        args: as for `DPOTrainer`.
        options: as for `DPOTrainer` and `DualPipeTrainer`.

    Raises:
        ConfigError: as for `DualPipeTrainer`; what `docs/trainer.md` lists as refused.
    """

    eval_dataset: Any
    train_dataset: Any
    ref_model: Model
    precompute_ref_logps: bool
    _stock = DPOTrainer
    _row_blocks = 2
    _for_the_loss = ("labels", "completion_mask", *LOGS)

    def __init__(
        self, model: Model, ref_model: PreTrainedModel | None = None, args: DPOConfig | None = None, **options: Any
    ) -> None:
        if options.get("compute_metrics") is not None:
            raise ConfigError("compute_metrics has no logits of pairs here: use the metrics that TRL logs")
        self._made = False
        self._reference_engine: DualPipeEngine | None = None
        super().__init__(model, args, ref_model=ref_model, **options)
        if self.ref_model is not None:
            self.ref_model.__dict__.pop("forward", None)  # as that of the model
        self._made, self._ahead = True, self.args.precompute_ref_log_probs
        self.precompute_ref_logps = True  # each batch has them, if not the data
        rows = self.args.precompute_ref_batch_size
        add = partial(self._precompute_ref_logps, batch_size=rows or self.args.per_device_train_batch_size)
        self.train_dataset = add(self.train_dataset, "train")
        add = partial(self._precompute_ref_logps, batch_size=rows or self.args.per_device_eval_batch_size)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: add(dataset, name) for name, dataset in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = add(self.eval_dataset, "eval")

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = lambda model, **_: model  # a reference is not moved as a whole

    def predict(self, *args: Any, **options: Any) -> PredictionOutput:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError("predict has no logits of pairs here: use evaluate, or a DualPipeTrainer")

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """As the Trainer's, and with the log-probabilities of the reference [pairs]. Collective."""
        inputs = super()._prepare_inputs(inputs)
        return inputs if self._ahead else inputs | dict(zip(LOGS, self._logs_of(inputs), strict=True))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if not self._made or not self._ahead:
            return dataset
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"precompute_ref_log_probs=True adds columns, which an {type(dataset).__name__} has not: leave it out, "
                "or give a Dataset"
            )
        loader = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        columns: dict[str, list[float]] = {column: [] for column in LOGS}
        for batch in self._prepare_loader(1, 0, loader):
            for column, logs in zip(columns.values(), self._logs_of(super()._prepare_inputs(batch)), strict=True):
                column += logs.tolist()
        return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)

    def _logs_of(self, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities [pairs] of chosen and of rejected rows under the reference. Collective."""
        stages = self._make_engine().module  # of what trains, before TRL leaves the adapters out
        trained = [param for param in stages.parameters() if param.requires_grad]
        found: tuple[torch.Tensor, torch.Tensor] = self.compute_ref_log_probs(self._reference, inputs)
        stages.requires_grad_(False)  # what comes back may have trained all of an adapter of which some is frozen
        for param in trained:
            param.requires_grad_(True)
        return found

    def _reference(self, *, labels: torch.Tensor, **inputs: Any) -> FusedCausalLMOutput:
        """Log-probabilities of the tokens of a batch, on the stages. Collective."""
        engine, loss = self._make_engine(), self._loss
        if self.ref_model is not None:
            engine = self._make_reference()
            loss = engine.module.loss_fn
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        micros = with_weights(self._split(tensors | {"labels": labels}), None)

        def logs(output: Nest, given: Mapping[str, Any]) -> Nest:
            return {"log_probs": fused(output, given["labels"]).log_probs}

        # In the precision of the stages that train, so that equal weights give equal numbers.
        exact = torch.autocast(labels.device.type, enabled=False)
        with exact, self._stage_randomness(), loss.evaluating(False, False, keep=logs) as kept:
            engine.eval_batch(iter(micros), num_micro_batches=len(micros))
        return FusedCausalLMOutput(**(self._together(kept, len(labels), engine) or {}))

    def _make_reference(self) -> DualPipeEngine:
        """The engine of `ref_model`, which holds each stage once; built at the first use. Collective."""
        if self._reference_engine is None:
            given = self._configuration()
            kept = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print", "bf16", "fp16")
            pipeline = {name: value for name, value in given["pipeline"].items() if name == "p2p_timeout_s"}
            settings = {name: given[name] for name in kept if name in given}
            reference = base_model(self.ref_model)
            loss = TrainerLoss(self, reference, None)
            settings |= {"pipeline": {"schedule": "1f1b"} | pipeline}
            with self._stage_randomness():
                module = on_stages(get_model_adapter(reference), loss, self._stages, self._replicas)
                self._reference_engine, *_ = initialize(model=module, config=settings)
        return self._reference_engine

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
