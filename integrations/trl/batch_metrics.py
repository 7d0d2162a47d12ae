"""Metrics of a TRL trainer over whole batches: entropy, token accuracy, rewards.

TRL computes them in `compute_loss`, which here sees one micro-batch, on a rank that runs the last stage. What it puts
down there is dropped; of the batch, all ranks get the numbers of each token and let TRL compute its metrics of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer

from dualpipe_engine.comm.from_all import from_all
from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.errors import ConfigError

from ..outputs import collect, share
from ..transformers import DualPipeTrainer
from ..transformers.batches import Batch, Model
from ..transformers.loss import StandIn
from .fused import FusedStandIn, Whole


class BatchMetrics(DualPipeTrainer):
    """A `DualPipeTrainer` that a trainer of TRL is mixed into."""

    _trl: type[Trainer]  #: whose `compute_loss` has the metrics
    _metrics: dict[str, Any]
    _total_train_tokens: int
    aux_loss_enabled: bool
    compute_loss_func: Any
    label_smoother: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        self._fields: dict[int, Nest] = {}
        super().__init__(*args, **options)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        base.__dict__.pop("forward", None)  # with a fused head that no rank runs
        if self.args.activation_offloading:
            raise ConfigError("activation_offloading=True hooks a model that no rank runs; leave it out")
        if self.aux_loss_enabled:
            raise ConfigError("the auxiliary loss of experts is not there in one micro-batch: router_aux_loss_coef=0.0")

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
        fields = self._together(self._fields, len(inputs["input_ids"]))
        self._fields.clear()
        if fields is not None:
            self._measure(Whole(fields), inputs)

    def _together(self, fields: dict[int, Nest], rows: int) -> dict[str, torch.Tensor] | None:
        """Fields [rows, ...] of the micro-batches as those of the batch, on all ranks; None: there are none."""
        engine = self._make_engine()
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
                self._trl.compute_loss(self, model, dict(inputs))
        finally:
            self.compute_loss_func, self.label_smoother = own


def _gather(group: Any) -> Any:  # noqa: ANN401
    """`gather` of an accelerator over the replicas."""

    def gather(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([found.to(value.device) for found in from_all(torch.atleast_1d(value).cpu(), group)])

    return gather
