"""Evaluation and prediction of a Trainer on the stages.

The loss is the engine's. Logits are kept where the last stage has made them, and only if somebody asks for them: for
metrics they go to one rank of the pipeline, which computes the metrics and tells the others; for `predict`, which
returns them, to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.errors import DualPipeError

from ..outputs import collect, of_whole_sequences, share
from ..random_streams import StageRandomness, follow
from .batches import Batch, Model, rows_of, split_batch
from .loss import TrainerLoss, with_weights
from .shared_loss import SharedLoss
from .whole_model import base_model

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine

Found = tuple[torch.Tensor | None, Nest, Nest]
"""Loss, logits and labels of a batch, as `prediction_step` returns them."""


class PipelineEvaluation(Trainer):
    """The part of `DualPipeTrainer` that evaluates. Every pipeline sees all of the data."""

    _num_chunks: int
    _example: Batch | None
    _stage_randomness: StageRandomness
    _loss: TrainerLoss
    compute_metrics: Any
    preprocess_logits_for_metrics: Any
    _for_the_loss: tuple[str, ...] = ("labels",)  #: names of inputs that the stages do not need
    _stock: type[Trainer] = Trainer  #: whose losses are known
    _everywhere = True  #: whether all ranks are given the logits
    _row_blocks = 1  #: in which the rows of a batch come, as chosen ones and then rejected ones
    _shrink: Callable[[Nest, Nest], Nest] | None = None  #: what makes less of the logits before they travel

    def _make_engine(self) -> DualPipeEngine:
        raise NotImplementedError

    def _shifted(self) -> bool:
        raise NotImplementedError

    def _looks_at_losses(self) -> bool:
        """Whether a batch is cut whose loss is the user's own, so that nobody knows what it is a mean of."""
        return self._has_own_loss() and self._num_chunks > 1

    def _has_own_loss(self) -> bool:
        return type(self).compute_loss is not self._stock.compute_loss or self.compute_loss_func is not None

    def _alone(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _one_batch(self, inputs: Batch) -> AbstractContextManager[None]:
        """Around what the stages do with a batch, in training and in evaluation."""
        return nullcontext()

    def _split(self, inputs: Batch) -> list[Batch]:
        return split_batch(inputs, self._num_chunks)

    def _micros(
        self, inputs: Batch, items: torch.Tensor | int | None, readers: int, labelled: bool = True
    ) -> list[Any]:
        """Micro-batches as the engine reads them: inputs, and what the loss needs."""
        parts = self._split(inputs)
        if isinstance(self._loss, SharedLoss):
            return self._loss.micros(parts, items, readers, labelled)
        return with_weights(parts, items, readers, self._shifted(), self._names_for_the_loss(inputs))

    def _names_for_the_loss(self, inputs: Batch) -> tuple[str, ...]:
        """Of what the stages do not need; all that the model does not name is for a `compute_loss` of the user's."""
        if type(self).compute_loss is self._stock.compute_loss:
            return self._for_the_loss
        named = {*signature(base_model(self.model).forward).parameters, *(self._example or {})}
        return (*self._for_the_loss, *(name for name in inputs if name not in named))

    def _rows_of(self, inputs: Batch) -> int:
        return rows_of(inputs)

    def _labels_of(self, inputs: Batch) -> tuple[bool, Nest]:
        """Whether a batch has what a loss needs, and its labels as the Trainer hands them to metrics."""
        labels = tuple(inputs.get(name) for name in self.label_names)
        if not labels or any(each is None for each in labels):
            return False, None
        return True, labels[0] if len(labels) == 1 else labels

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        engine = self._make_engine()
        overridden = type(self).prediction_step is not PipelineEvaluation.prediction_step
        everywhere = overridden or description == "Prediction"
        metrics = self.compute_metrics
        failed: list[Exception] = []

        def told(*given: Any, **options: Any) -> dict[str, Any]:
            try:
                found: dict[str, Any] = metrics(*given, **options)
                return found
            except Exception as error:
                failed.append(error)
                return {}

        with self._as_one_process(everywhere, overridden):
            if everywhere or metrics is None:
                return super().evaluation_loop(dataloader, description, *args, **kwargs)
            self.compute_metrics = told
            try:
                found = super().evaluation_loop(dataloader, description, *args, **kwargs)
            finally:
                self.compute_metrics = metrics
        box = [found.metrics, repr(failed[0]) if failed else None]
        dist.broadcast_object_list(box, src=engine.place.has_outputs, group=engine._pipeline_group)
        follow(engine, engine.place.has_outputs)  # metrics may draw random numbers
        if failed:
            raise failed[0]
        if box[1] is not None:
            raise DualPipeError(f"compute_metrics has failed on rank {engine.place.has_outputs}: {box[1]}")
        return found._replace(metrics=box[0])

    @contextmanager
    def _as_one_process(self, everywhere: bool, overridden: bool) -> Iterator[None]:
        """All ranks have the whole batch, or nothing of it: none pads or gathers."""
        accelerator, shrink = self.accelerator, self.preprocess_logits_for_metrics
        pad = accelerator.pad_across_processes
        self._everywhere = everywhere
        if everywhere and not overridden:
            self._shrink, self.preprocess_logits_for_metrics = shrink, None
        accelerator.pad_across_processes = lambda value, *args, **kwargs: value
        self.gather_function = lambda value: value[: self._rows] if isinstance(value, torch.Tensor) else value
        try:
            yield
        finally:
            accelerator.pad_across_processes = pad
            self._everywhere, self._shrink, self.preprocess_logits_for_metrics = True, None, shrink

    def prediction_step(
        self, model: Model, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Found:
        """As the Trainer's. In an evaluation logits and labels are None on all ranks but one of each pipeline."""
        engine = self._make_engine()
        model.eval()
        inputs = self._prepare_inputs(inputs)
        self._rows = self._rows_of(inputs)
        labelled, labels = self._labels_of(inputs)
        if prediction_loss_only and not labelled:
            return None, None, None
        items = self._items_of(inputs) if labelled else None
        micros = self._micros(inputs, items, 1, labelled)
        evaluating = self._loss.evaluating(labelled, prediction_loss_only, ignore_keys)
        with self._one_batch(inputs), evaluating as kept, self._stage_randomness():
            mean: Any = engine.eval_batch(iter(micros), num_micro_batches=len(micros))
        loss = mean.detach() if labelled else None
        if prediction_loss_only:
            return loss, None, None
        here = engine.global_rank == engine.place.has_outputs
        logits = of_whole_sequences(collect(kept, engine), engine)
        if not self._everywhere:
            return (loss, logits, labels) if here else (loss, None, None)
        if self._shrink is not None and here:
            logits = self._shrink(logits, labels)
        return loss, share(logits, engine), labels

    def _items_of(self, inputs: Batch) -> torch.Tensor | int | None:
        """Labels of a batch that count, for `compute_loss`."""
        with self._alone():
            return Trainer._get_num_items_in_batch(self, [inputs], self.args.device)
