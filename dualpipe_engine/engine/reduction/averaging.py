"""Averaging: the factors that turn sums over micro-batches and copies into the mean of a batch."""

from __future__ import annotations

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine

from ..context import Context, Scaling
from ..given import Settings
from .masters import Masters


class Averaging(PipelineEngine):
    """The part of `DualPipeEngine` that scales losses and gradients."""

    _context: Context
    masters: Masters

    def _scaling(self) -> Scaling:
        dtype, copies = self.communication_data_type, self.mpu.get_data_parallel_world_size()
        if not self.gradient_average:
            return Scaling(dtype)
        if not self.postscale_gradients():
            return Scaling(dtype, before=1.0 / copies)
        ahead = self.gradient_predivide_factor()
        return Scaling(dtype, 1.0 / ahead, ahead / copies)

    def _loss_factor(self) -> float:
        """Factor on each loss before its backward, so that DeepSpeed's mean (or sum) over all copies of a stage comes
        out as the mean over micro-batches and the mean (or sum) over replicas."""
        copies = self._context.plan.placement.num_directions if self.gradient_average else 1
        return copies / self.micro_batches * self._loss_scale()

    def _loss_scale(self) -> float:
        return float(self._get_optimizer_loss_scale()) if self.fp16_enabled() else 1.0

    def _exec_optimizer_step(self, lr_kwargs: Settings | None = None) -> None:
        self.masters.follow(self.optimizer)
        scale = self._loss_scale()  # a step may change it
        super()._exec_optimizer_step(lr_kwargs)
        if isinstance(self.optimizer, FP16_UnfusedOptimizer):  # its norm is that of scaled gradients
            self._global_grad_norm /= scale
