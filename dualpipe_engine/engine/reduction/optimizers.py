"""DeepSpeed's optimizers around that of torch, in a pipeline: groups, norms of what several ranks hold, fragments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ...errors import ConfigError
from ..context import Context
from ..given import Optimizer, ParamEntry, Scheduler
from ..placing.experts import has_experts
from ..placing.module import PlacedModule
from ..placing.param_groups import GroupMap
from .freezing import TrainedParams
from .masters import Masters
from .tail import GradientTail


class Optimizers(PipelineEngine):
    """The part of `DualPipeEngine` that makes them."""

    module: PlacedModule
    has_moe_layers: bool
    masters: Masters
    _context: Context
    _pipeline_group: dist.ProcessGroup
    _tail: GradientTail
    _trained: TrainedParams

    def _configure_optimizer(self, client_optimizer: Optimizer, model_parameters: Iterable[ParamEntry] | None) -> None:
        """DeepSpeed's optimizers learn of experts from this flag, which it sets for layers of its own only; elsewhere
        the flag would mean checkpoint files of such layers. A client that calls this after `initialize` may give
        parameters that it has listed before."""
        again = "_tail" in vars(self)
        if again:
            groups = GroupMap(self.module, model_parameters, client_optimizer, self._pipeline_group)
            client_optimizer, mapped = groups.apply()
            model_parameters = list(self.module.parameters()) if mapped is None else mapped
        before = self.has_moe_layers
        self.has_moe_layers = has_experts(self.module)
        super()._configure_optimizer(client_optimizer, model_parameters)
        self.has_moe_layers = before
        self.masters.link(self.optimizer, self.module)
        if again:
            self.using_bf16_optimizer = type(self.optimizer) is BF16_Optimizer
            self._context.optimizer = self.optimizer
            self._trained.restart()
            self._tail.renew()

    def _configure_lr_scheduler(self) -> None:
        super()._configure_lr_scheduler()
        if isinstance(self.lr_scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "ReduceLROnPlateau steps by a metric, and DeepSpeed would give it the batch size, so that the rate "
                "falls whatever the loss does: make it of engine.basic_optimizer after initialize, and call step(loss)"
            )

    def _scheduler_from_config(self, optimizer: Optimizer) -> Scheduler:
        """Schedulers of torch take the optimizer of torch that DeepSpeed's has within."""
        known = hasattr(lr_schedules, self.scheduler_name() or "")
        return super()._scheduler_from_config(optimizer if known else self.basic_optimizer)

    def _configure_fp16_optimizer(self, optimizer: Optimizer, low_precision_dtype: torch.dtype) -> Optimizer:
        """That for any optimizer of torch takes gradients without what marks their parameters, so that its norm would
        count tied weights on each of their ranks, and neither experts nor slices of tensor parallelism."""
        found = super()._configure_fp16_optimizer(optimizer, low_precision_dtype)
        if isinstance(found, FP16_UnfusedOptimizer):
            plain = found.unscale_and_clip_grads

            def with_norm(_: float, apply_scale: bool = True) -> float:
                found._global_grad_norm = float(self._tail.norm())
                return plain(found._global_grad_norm, apply_scale)

            found.unscale_and_clip_grads = with_norm
        return found

    def _configure_zero_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Under "round_robin_gradients" ZeRO looks for the fragments of parameters, which checkpoints and
        `deepspeed.utils` name, as if its flat weights had the order of the groups."""
        found = super()._configure_zero_optimizer(optimizer)
        if self.zero_round_robin_gradients():
            plain = found._link_all_hp_params

            def in_order() -> None:
                of_groups, found.bit16_groups = found.bit16_groups, found.round_robin_bit16_groups
                try:
                    plain()
                finally:
                    found.bit16_groups = of_groups

            found._link_all_hp_params = in_order
            in_order()
            found._param_slice_mappings = found._create_param_mapping()
            if found.cpu_offload:
                found._create_optimizer_mapping()
        return found
