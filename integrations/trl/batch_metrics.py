"""Metrics of a TRL trainer over whole batches: entropy, token accuracy, rewards.

TRL computes them in `compute_loss`, which here sees one micro-batch, on a rank that runs the last stage. What it puts
down there is dropped; of the batch, all ranks get the numbers of each token and let TRL compute its metrics of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from dualpipe_engine.comm.from_all import from_all
from dualpipe_engine.comm.nest import Nest

from ..outputs import collect, share
from ..transformers import DualPipeTrainer
from ..transformers.batches import Batch, Model
from ..transformers.loss import StandIn
from ..transformers.whole_model import base_model
from .fused import FusedStandIn, Whole
from .refusals import refuse_data, refuse_settings

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine


class BatchMetrics(DualPipeTrainer):
    """A `DualPipeTrainer` that a trainer of TRL is mixed into."""

    _stock: type[Trainer]  #: whose `compute_loss` has the metrics
    _metrics: dict[str, Any]
    _total_train_tokens: int
    compute_loss_func: Any
    label_smoother: Any

    def __init__(self, model: Model, args: TrainingArguments | None = None, *positional: Any, **options: Any) -> None:
        if args is not None:
            refuse_settings(args, options.get("num_chunks", 8))
        self._fields: dict[int, Nest] = {}
        super().__init__(model, args, *positional, **options)
        refuse_data(self)
        base_model(self.model).__dict__.pop("forward", None)  # with a fused head that no rank runs

    def _stand_in(self, *given: Any) -> StandIn:
        return FusedStandIn(*given, kept=self._fields)

    @contextmanager
    def _one_batch(self, inputs: Batch) -> Iterator[None]:
        kept, tokens = self._metrics, self._total_train_tokens
        self._fields.clear()
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        try:
            yield
        finally:
            self._metrics, self._total_train_tokens = kept, tokens
        fields = self._together(self._fields, len(inputs["input_ids"]), self._make_engine())
        self._fields.clear()
        if fields is not None:
            self._measure(Whole(fields), inputs)

    def _together(self, fields: dict[int, Nest], rows: int, engine: DualPipeEngine) -> dict[str, torch.Tensor] | None:
        """Fields [rows, ...] of the micro-batches as those of the batch, on all ranks; None: there are none."""
        found = share(collect(fields, engine), engine)
        if found is None:
            return None
        order = torch.cat([micro["rows"] for micro in self._split({"rows": torch.arange(rows)})]).argsort()
        return {name: value[order.to(value.device)] for name, value in found.items()}

    @torch.no_grad()
    def _measure(self, model: Model, inputs: Batch) -> None:
        replicas, own = self._make_engine()._replica_group, (self.compute_loss_func, self.label_smoother)
        self.compute_loss_func = self.label_smoother = None  # they ask for logits, and no metric for them
        try:
            with self._alone():
                if self._replicas > 1 and self.model.training:
                    gather = _gather(replicas)
                    self.accelerator.gather = self.accelerator.gather_for_metrics = gather
                self._stock.compute_loss(self, model, dict(inputs))
        finally:
            self.compute_loss_func, self.label_smoother = own


def _gather(group: Any) -> Any:  # noqa: ANN401
    """`gather` of an accelerator over the replicas."""

    def gather(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([found.to(value.device) for found in from_all(torch.atleast_1d(value).cpu(), group)])

    return gather
