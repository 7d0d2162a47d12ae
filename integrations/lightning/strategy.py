"""DualPipeStrategy: the devices of a Trainer are the ranks of one pipeline, or of several that are replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import RandomSampler

from dualpipe_engine.compat.deepseek import Nest
from dualpipe_engine.errors import CheckpointError, ConfigError

from .refusals import refuse_hooks


class DualPipeStrategy(DDPStrategy):
    """Runs a `DualPipeLightningModule`. Launching and process groups are those of DDP; nothing else of it is used.

    Gradients come out of `training_step`, so Lightning's backward does nothing. A checkpoint holds the whole model and
    the optimizer state of each device.

    Args:
        num_stages: devices of a pipeline, an even number; None: all. Where there are more devices, they are replicas:
            Lightning's distributed sampler shares the samples between them, and gradients are averaged.
        kwargs: of DDPStrategy.
    """

    strategy_name = "dualpipe"

    def __init__(self, num_stages: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._num_stages = num_stages

    @property
    def num_stages(self) -> int:
        """Devices of a pipeline.

        Raises:
            ConfigError: the devices do not make up whole pipelines.
        """
        found, world = self._num_stages, self.world_size
        if found is not None and (found < 1 or world % found):
            raise ConfigError(
                f"{world} devices are no pipelines of num_stages={found}: their number must be a multiple"
            )
        return found or world

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size // self.num_stages, "rank": self.global_rank // self.num_stages}

    def process_dataloader(self, dataloader: object) -> object:
        """All devices of a pipeline read the same samples: a loader that shuffles gets one seed for all of them."""
        sampler = getattr(dataloader, "sampler", None)
        if isinstance(sampler, RandomSampler) and sampler.generator is None:
            sampler.generator = torch.Generator().manual_seed(self.broadcast(torch.initial_seed()))
        return dataloader

    def setup(self, trainer: Trainer) -> None:
        if self.num_stages == self.world_size:
            trainer._accelerator_connector.use_distributed_sampler = False  # all devices read all samples
        super(DDPStrategy, self).setup(trainer)  # DDP's own would make the stages of all devices equal
        from .module import DualPipeLightningModule

        refuse_hooks(
            self.lightning_module, DualPipeLightningModule, trainer.callbacks, self.optimizers, self.precision_plugin
        )

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model

    def training_step(self, *args: Any, **kwargs: Any) -> Nest:
        trainer = self.lightning_module.trainer
        if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return closure_loss

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Nest], model: nn.Module | None = None, **kwargs: Any
    ) -> Nest:
        def closure_and_sum() -> Nest:
            result = closure()
            self.lightning_module.dualpipe_wrapper.sum_mirrored_gradients()
            return result

        return super().optimizer_step(optimizer, closure_and_sum, model, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.dualpipe_wrapper.whole_state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.lightning_module.dualpipe_wrapper.load_whole_state_dict(checkpoint["state_dict"])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        states: list[Any] = [None] * self.world_size
        dist.all_gather_object(states, super().optimizer_state(optimizer))
        return {"devices": states}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            states = saved.get("devices", ())
            if len(states) != self.world_size:
                raise CheckpointError(
                    f"the checkpoint holds the optimizer state of {len(states)} pipeline devices, but there are "
                    f"{self.world_size}: resume with as many, or load its weights only"
                )
            optimizer.load_state_dict(states[self.global_rank])
            _optimizer_to_device(optimizer, self.root_device)

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        strategy_registry.register(cls.strategy_name, cls, description="DualPipe pipeline over all devices")


if DualPipeStrategy.strategy_name not in StrategyRegistry:
    DualPipeStrategy.register_strategies(StrategyRegistry)
