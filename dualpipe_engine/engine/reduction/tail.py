"""GradientTail: what happens to gradients between a backward and the optimizer step, in DeepSpeed's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import is_model_parallel_parameter

from ...faults.watch import Watch
from ...models.routing import rebalance
from ...schedule.progress import waiting
from ...schedule.records import DRAIN
from ..batches.steps import WHOLE, PartOfStep
from ..checks.finite import FiniteCheck
from ..context import Context
from .all_reduce import AllReduce
from .choose import choose_reduction
from .freezing import TrainedParams
from .norm import sum_of_squares, sum_over_experts


class GradientTail:
    """Accumulates, reduces and steps for an engine; the executor's `Tail`.

    Args:
        context: of the engine.
        trained: which parameters are.
        finite: looks for NaN and inf.
        watch: knows of lost ranks.
    """

    def __init__(self, context: Context, trained: TrainedParams, finite: FiniteCheck, watch: Watch) -> None:
        self._context, self._trained, self._finite, self._watch = context, trained, finite, watch
        self._plan, self._part = context.plan, WHOLE
        self.reduction = choose_reduction(context, trained)

    def begin(self, drain: Callable[[], None], part: PartOfStep = WHOLE) -> None:
        """Start of a batch.

        Args:
            drain: reads what the program leaves of its data.
            part: of which step it is.
        """
        self._drain, self._part = drain, part
        if self._plan is not self._context.plan:  # which stage closes a weight that two share depends on the plan
            self._plan = self._context.plan
            self.renew()
        self.reduction.begin()

    def renew(self) -> None:
        """The plan, the optimizer or what is trained has changed."""
        self.reduction = choose_reduction(self._context, self._trained)

    def accumulate(self, stage: int) -> None:
        """Move fresh gradients to where they are added up, when that is not `param.grad`."""
        self.reduction.accumulate(stage)

    def reduce(self, stage: int) -> None:
        """Start the reduction of a stage over its copies and replicas, where its gradients are complete."""
        if self._part.last:
            self.reduction.reduce(stage)

    def step(self, losses: Mapping[int, torch.Tensor]) -> None:
        """Wait for all reductions, then step, where the batch ends a step.

        Raises:
            PipelineRuntimeError: a rank is lost, so that gradients may not be what they should.
            Exception: the batch has failed on a rank; on all ranks.
        """
        context, trained = self._context, self._trained
        self._read_rest()
        bad = self._finite.borders.bad(context.device)
        context.totals.start(losses, context.plan.num_micro, bad, trained.balance)
        with waiting():
            with context.observer.waiting(DRAIN):
                if self._part.last:
                    self.reduction.finish()
                context.totals.finish()  # all ranks are here, and know whether the batch has failed on one
                if trained.news:
                    self._follow()
            if context.device.type == "cuda":  # once a step: what has not arrived is not to be stepped on
                torch.cuda.current_stream(context.device).synchronize()
        self._watch.check()
        self._watch.raise_failed()
        if not self._part.apart:
            self._step()

    def take_step(self) -> None:
        """Step after batches that were parts of it; what the last of them has not reduced is reduced now."""
        if not self._part.last:
            with waiting():
                for stage in self._context.place.stages:
                    self.reduction.reduce(stage)
                self.reduction.finish()
        self._step()

    def _step(self) -> None:
        """Step; routers follow what the batches have shown."""
        context = self._context
        self._finite.before_step(context.steps.done() + 1)
        with waiting(alone=False):  # the user's optimizer may fail, too
            context.steps.step()
            every = context.load_report_steps
            due = every is not None and context.steps.done() % every == 0
            rebalance(context.module, context.groups.copies, due)

    def forget(self) -> None:
        """Drop the gradients of a batch that was not stepped."""
        context, optimizer = self._context, self._context.optimizer
        for param in context.module.parameters():
            param.grad = None
            if getattr(param, "grad_accum", None) is not None:
                param.grad_accum = None
        if context.sums_in_fp32:
            optimizer.clear_hp_grads()
        if getattr(optimizer, "cpu_offload", False):
            optimizer.reset_cpu_buffers()
        self.reduction.begin()

    def _read_rest(self) -> None:
        """Both ends leave the stream at the same place, also after a batch that has failed."""
        if self._watch.batch_failed:
            with suppress(Exception):
                self._drain()
            return
        try:
            self._drain()
        except Exception as error:
            self._watch.fail_batch(error, "the end of train_batch")

    def _follow(self) -> None:
        """This batch began with other parameters to train than the one before: its reductions were those of the ones
        before, so that a copy that has not heard of it does not wait in vain; now, if all have, reduce the new ones."""
        trained, before = self._trained, self.reduction
        if trained.agreed() and trained.settle():
            self.renew()
            if isinstance(before, AllReduce) and self._part.last:
                before.catch_up()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip all gradients by their global 2-norm; returns the norm before clipping (scalar)."""
        norm = self.norm()
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for param in self._context.module.parameters():
            if param.grad is not None:
                by_dtype.setdefault(param.grad.dtype, []).append(param.grad)
        for dtype, grads in by_dtype.items():
            torch._foreach_mul_(grads, factor.to(dtype))
        return norm

    def norm(self) -> torch.Tensor:
        """The global 2-norm of all gradients (scalar).

        Gradients are reduced already, so the copies of a stage hold the same values: the squares are added up over one
        copy of each stage, and tied and replicated parameters count on one rank only.
        """
        first = self._context.first_slice
        params = [param for param in self._context.module.parameters() if param.grad is not None]
        square = torch.zeros((), dtype=torch.float64, device=self._context.device)
        for param in params:
            if is_moe_param(param) or param.ds_pipe_replicated or not (first or is_model_parallel_parameter(param)):
                continue
            square += sum_of_squares(param.grad)
        sum_over_experts(square, params)
        dist.all_reduce(square, group=self._context.groups.model)
        return square.sqrt().float()
