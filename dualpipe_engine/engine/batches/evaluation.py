"""Evaluation: the forward of a batch on the stages of a training engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.torch_autocast import autocast_if_enabled

from ...comm.nest import Nest
from ...errors import ConfigError
from ...faults.watch import watched
from ...runtime.executor import BatchResult
from ...schedule.passes.lower import forward_only, lower
from ..placing.grid import Place


class Evaluation(PipelineEngine):
    """The part of `DualPipeEngine` that evaluates."""

    data_iterator: Iterator[Nest] | None
    place: Place

    @watched
    def eval_batch(
        self,
        data_iter: Iterator[Nest],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Nest:
        """Run the forward of one batch, without gradients.

        Args:
            data_iter: as in `train_batch`.
            return_logits: also return the last stage's output for the last micro-batch.
            compute_loss: reduce losses; False reduces the outputs themselves.
            reduce_output: "avg" for the mean over micro-batches and replicas, None for the list over micro-batches.
            bcast_loss: give the loss to all ranks, not only to those that hold the last stage.
            num_micro_batches: None for as many as in training.

        Returns:
            The mean loss, or what `compute_loss` and `reduce_output` ask for; with `return_logits` a pair with the
            output of the last micro-batch. Outputs are on the ranks that hold the last stage, None elsewhere.
        """
        num_micro = num_micro_batches or self.micro_batches
        train_iterator = self.data_iterator
        self.set_dataiterator(data_iter)
        self._set_training(False)
        plan = lower(forward_only(self.plan.placement, num_micro), train=False)
        feed = self._feed(num_micro)
        with torch.no_grad(), autocast_if_enabled(self):
            result = self._eval_executor.run(plan, feed, train=False)
            feed.drain()
            self.module.micro_offset += num_micro
            value = self._eval_value(result, num_micro, compute_loss, reduce_output)
        if not self.module.training:
            ds_checkpointing.reset()
        if compute_loss and not bcast_loss and not self.place.reads_labels:
            value = None
        if self.global_rank == 0 and self.monitor.enabled and isinstance(value, torch.Tensor):
            self.monitor.write_events([("Train/Samples/eval_loss", value.mean().item(), self.global_samples)])
        self.data_iterator = train_iterator
        if return_logits:
            return value, self._share_outputs(result, [num_micro - 1])[num_micro - 1]
        return value

    def _eval_value(self, result: BatchResult, num_micro: int, compute_loss: bool, reduce: str | None) -> Nest:
        loss_fn = self.module.loss_fn
        if reduce not in (None, "avg"):
            raise ConfigError(f'reduce_output must be "avg" or None, got {reduce!r}')
        if compute_loss:
            losses = {m: out if loss_fn is None else loss_fn(out, y) for m, (out, y) in result.outputs.items()}
            if reduce == "avg":
                self.totals.start(losses, num_micro)
                return self.totals.finish().loss
            result = BatchResult(outputs={micro: (loss, None) for micro, loss in losses.items()})
        shared = self._share_outputs(result, list(range(num_micro)))
        if not self.place.reads_labels:
            return None
        outputs = [shared[micro] for micro in range(num_micro)]
        return outputs if reduce is None else self._reduce_outputs(outputs, reduce, micro_batches=num_micro)

    def _share_outputs(self, result: BatchResult, micros: list[int]) -> dict[int, Nest]:
        """Give the outputs of `micros` to every rank that holds the last stage; None on the others."""
        placement, last = self.plan.placement, self.plan.placement.num_stages - 1
        shared = dict.fromkeys(micros)
        for micro in micros:
            if micro in result.outputs:
                shared[micro] = result.outputs[micro][0]
            if placement.num_directions == 2:
                box = [shared[micro]]
                source = self.place.pipeline[placement.rank_of(last, micro)]
                dist.broadcast_object_list(box, src=source, group=self._pipeline_group)
                if self.place.reads_labels:
                    shared[micro] = box[0]
        return shared
