"""AfterSchedule: gradients are left to DeepSpeed's own reduction."""

from __future__ import annotations

import torch

from ..context import Context
from .freezing import TrainedParams


class AfterSchedule:
    """DeepSpeed's own reduction, of all stages together after the schedule: for sparse gradients, and for optimizers
    that work on whole gradients within it (Muon)."""

    def __init__(self, context: Context, trained: TrainedParams) -> None:
        self._context = context

    def begin(self) -> None:
        clear = getattr(self._context.optimizer, "clear_backward_seen_flag", None)
        if clear is not None:
            clear()

    def accumulate(self, stage: int) -> None:
        optimizer = self._context.optimizer
        if self._context.sums_in_fp32:
            optimizer.update_hp_grads(clear_lp_grads=False)
            optimizer.clear_lp_grads(set_to_none=True)
        elif getattr(optimizer, "use_grad_accum_attribute", False):
            optimizer.fill_grad_accum_attribute()

    def reduce(self, stage: int) -> None:
        """Nothing yet: see `finish`."""

    def finish(self) -> None:
        self._fill_missing()
        self._context.steps.reduce()

    def buffers(self) -> list[torch.Tensor]:
        return []

    def held(self) -> list[torch.Tensor]:
        return []

    def _fill_missing(self) -> None:
        """Zero gradients where this rank ran no backward, so that all copies of a stage reduce the same tensors."""
        if self._context.sums_in_fp32:
            return
        accumulated = getattr(self._context.optimizer, "use_grad_accum_attribute", False)
        for param in self._context.module.parameters():
            if not param.requires_grad:
                continue
            if accumulated and param.grad_accum is None:
                dtype = self._context.optimizer.gradient_accumulation_dtype
                param.grad_accum = torch.zeros_like(param, dtype=dtype)
            elif not accumulated and param.grad is None:
                param.grad = torch.zeros_like(param)
