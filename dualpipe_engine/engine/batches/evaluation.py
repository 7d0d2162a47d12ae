"""Evaluation: the forward of a batch on the stages of a training engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.activation_checkpointing import checkpointing as ds_checkpointing
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from torch.utils import _pytree as pytree

from ...comm.nest import Nest
from ...errors import ConfigError, raised_everywhere
from ...faults.watched import watched
from ...runtime.executor import BatchResult
from ...schedule.passes.lower import forward_only, lower
from ..checks.token_mixing import TokenMixing
from .loader import Loading
from .recovery import Recovery
from .running import RunningStages


class Evaluation(Recovery, Loading, RunningStages):
    """The part of `DualPipeEngine` that evaluates."""

    data_iterator: Iterator[Nest] | None
    _mixing: TokenMixing
    _replica_group: dist.ProcessGroup

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
            output of the last micro-batch, of the part of its sequences that the rank has. Outputs are on the ranks
            that hold the last stage, None elsewhere.

        Raises:
            Exception: what a layer, the loss, a hook or the data have raised; as `train_batch`.
        """
        if reduce_output not in (None, "avg"):
            raise ConfigError(f'reduce_output must be "avg" or None, got {reduce_output!r}', everywhere=True)
        num_micro = self.micro_batches if num_micro_batches is None else num_micro_batches
        if not isinstance(num_micro, int) or num_micro < 1:
            raise ConfigError(f"num_micro_batches must be an integer from 1, got {num_micro!r}", everywhere=True)
        if self.dualpipe_config.tiled_loss is not None and (return_logits or not compute_loss):
            raise ConfigError(
                '"tiled_loss": logits are never whole, so that evaluation returns losses only: leave out return_logits '
                'and compute_loss=False, or "tiled_loss"',
                everywhere=True,
            )
        if self.sharing.group is not None and (reduce_output is None or not compute_loss):
            raise ConfigError(
                'with "sequence_parallel_size" eval_batch gives the mean loss: drop reduce_output and compute_loss',
                everywhere=True,
            )
        self.module.eval()
        with self._attempt(), torch.no_grad(), autocast_if_enabled(self):
            result, losses, mean = self._run_eval(data_iter, num_micro, compute_loss, reduce_output == "avg")
            self.module.micro_offset += num_micro
            value: Nest = mean
            if mean is None:
                value = self._eval_value(losses if compute_loss else result, num_micro, reduce_output)
        if not self.module.training:
            ds_checkpointing.reset()
        if compute_loss and not bcast_loss and not self.place.reads_labels:
            value = None
        if self.global_rank == 0 and self.monitor.enabled and isinstance(value, torch.Tensor):
            self.monitor.write_events([("Train/Samples/eval_loss", value.mean().item(), self.global_samples)])
        if return_logits:
            return value, self._share_outputs(result, [num_micro - 1])[num_micro - 1]
        return value

    def _run_eval(
        self, data_iter: Iterator[Nest], num_micro: int, compute_loss: bool, average: bool
    ) -> tuple[BatchResult, BatchResult, torch.Tensor | None]:
        """Outputs, losses in place of outputs, and the mean loss over all ranks; the latter two if they are wanted.

        Raises:
            Exception: the batch has failed on a rank; on all ranks.
        """
        feed, losses, loss_fn = self._no_feed(), {}, self.module.loss_fn
        train_iterator = self.data_iterator
        try:
            if self.place.feeds:
                self.data_iterator = data_iter
            self._follow_module()
            feed = self._feed(num_micro)
        except Exception as error:
            self.watch.fail_batch(error, "eval_batch")
        with raised_everywhere():
            plan = lower(forward_only(self.plan.placement, num_micro), train=False)
        with self._mixing.watched(train=False):
            result = self._eval_executor.run(plan, feed, train=False)
        try:
            feed.drain()
            if compute_loss and not self.watch.batch_failed:
                losses = {m: out if loss_fn is None else loss_fn(out, y) for m, (out, y) in result.outputs.items()}
        except Exception as error:
            self.watch.fail_batch(error, "the end of eval_batch")
        finally:
            self.data_iterator = train_iterator
        averaged = compute_loss and average
        self.totals.start(losses if averaged else {}, num_micro)
        mean = self.totals.finish().loss
        float(mean)  # all ranks are here, and know whether the batch has failed on one
        self.watch.raise_failed()
        self._mixing.check(train=False)
        return result, BatchResult(outputs={m: (loss, None) for m, loss in losses.items()}), mean if averaged else None

    def _eval_value(self, result: BatchResult, num_micro: int, reduce: str | None) -> Nest:
        shared = self._share_outputs(result, list(range(num_micro)))
        if not self.place.reads_labels:
            return None
        outputs = [shared[micro] for micro in range(num_micro)]
        return outputs if reduce is None else self._mean_of(outputs)

    def _mean_of(self, outputs: list[Nest]) -> Nest:
        """The mean over micro-batches and replicas of each tensor in them."""

        def mean(*parts: Nest) -> Nest:
            if not isinstance(parts[0], torch.Tensor):
                return parts[0]
            total = torch.stack(parts).sum(0) / len(parts)
            if self.place.replicas > 1:
                dist.all_reduce(total, group=self._replica_group)
                total /= self.place.replicas
            return total

        return pytree.tree_map(mean, *outputs)

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
