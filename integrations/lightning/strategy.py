"""DualPipeStrategy: the devices of a Trainer are the ranks of one pipeline, or of several that are replicas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.engine.placing.sequences import read_sizes, readers_of
from dualpipe_engine.errors import ConfigError

from ..clipping import CLIPPING, clip_by_norm
from ..random_streams import follow_first
from ..sections import read_sections
from .checkpoint import load_engine, remove_engine, save_engine
from .engine import BY_NORM, SET_BY_LIGHTNING, configuration, make_engine, make_module
from .layers import Chain, LayerEntry, refill, release, share_start
from .refusals import refuse_optimizers, refuse_other_loss, refuse_trainer

if TYPE_CHECKING:
    from .module import DualPipeLightningModule

#: Arguments of DDPStrategy that are about processes; the others are about DistributedDataParallel.
PROCESSES = frozenset(
    (
        "accelerator",
        "parallel_devices",
        "cluster_environment",
        "checkpoint_io",
        "precision_plugin",
        "process_group_backend",
        "timeout",
        "start_method",
    )
)


class DualPipeStrategy(DDPStrategy):
    """Runs a `DualPipeLightningModule` on a DualPipeEngine. Launching and process groups are those of DDP.

    `training_step` runs forwards, backwards and reductions, so Lightning's backward does nothing; `optimizer.step` is
    the engine's, with clipping by the norm over all stages. A checkpoint is Lightning's file with the weights of the
    whole model, and a folder `FILE.engine` beside it with the engine's own state, which goes on bit for bit.

    Args:
        num_stages: devices of a pipeline; None: all. Where there are more devices, they are replicas: Lightning's
            distributed sampler shares the samples between them, and gradients are averaged. Replicas that share
            sequences ("sequence_parallel_size") have the same samples.
        schedule: as "schedule" in the "pipeline" section of DeepSpeed's configuration; "dualpipe" needs an even number
            of devices.
        deepspeed_config: sections added to the configuration that this makes, for instance
            `{"zero_optimization": {"stage": 2}}`; by default ZeRO-1.
        resume_elsewhere: load checkpoints that other ranks or another schedule have saved (ZeRO-1 and ZeRO-2).
        kwargs: of DDPStrategy, about processes and groups.

    Attributes:
        ends_step: whether a step follows the batch that runs.
        trained: losses (scalars) of the batches that the `training_step` that runs has trained on.

    Raises:
        ConfigError: an argument is for DistributedDataParallel, or `deepspeed_config` has what Lightning sets or a
            size that is no number.
    """

    strategy_name = "dualpipe"

    def __init__(
        self,
        num_stages: int | None = None,
        schedule: str = "dualpipe",
        deepspeed_config: Mapping[str, Any] | None = None,
        resume_elsewhere: bool = False,
        **kwargs: Any,
    ) -> None:
        wrong = [name for name in kwargs if name not in PROCESSES]
        if wrong:
            raise ConfigError(
                f"DualPipeStrategy({wrong[0]}=...) is for DistributedDataParallel, which is not used here"
            )
        super().__init__(**kwargs)
        self._num_stages, self._schedule = num_stages, schedule
        self._extra = read_sections(deepspeed_config, SET_BY_LIGHTNING)
        read_sizes(self._extra, None)
        self._resume_elsewhere = resume_elsewhere
        self._made = False  # the pipeline, in this run of the Trainer
        self._loaded: Path | None = None
        self.ends_step = False
        self.trained: list[Tensor] = []

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
    def readers(self) -> int:
        """Groups of pipelines with samples of their own; those of a group share each sequence.

        Raises:
            ConfigError: the pipelines do not make up whole groups.
        """
        return readers_of(self._extra, self.world_size // self.num_stages)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.readers, "rank": self._reader}

    @property
    def _reader(self) -> int:
        replicas = self.world_size // self.num_stages
        return self.global_rank % replicas * self.readers // replicas  # as in DeepSpeed's topology

    @property
    def _reads_first(self) -> bool:
        """Whether this is the first device of those that read the same samples."""
        replicas = self.world_size // self.num_stages
        return self.global_rank < replicas and self.global_rank % (replicas // self.readers) == 0

    def _counting_group(self) -> dist.ProcessGroup:
        """Devices at this position of their pipelines that have seen each sample once. Collective over all ranks."""
        engine = self.lightning_module.dualpipe_wrapper.made
        if (shared := engine.sharing.size) == 1:
            return engine._replica_group
        replicas = self.world_size // self.num_stages
        for first in range(self.world_size):
            position, replica = divmod(first, replicas)
            if replica < shared:
                ranks = range(first, (position + 1) * replicas, shared)
                group = dist.new_group(list(ranks))
                if self.global_rank in ranks:
                    own = group
        engine.own_groups = [*engine.own_groups, own]
        return own

    def process_dataloader(self, dataloader: object) -> object:
        """All devices of a pipeline, and of those that share sequences, read the same samples: so their workers draw
        the same random numbers."""
        _auto_add_worker_init_fn(dataloader, self._reader)
        return dataloader

    # -- setting up ----------------------------------------------------------------------------------------------

    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        self._made = False

    def make_pipeline(self, module: DualPipeLightningModule, layers: dict[str, LayerEntry]) -> None:
        """The stages and the engine of a run, once; called by `configure_model`. Each fit has an engine of its own,
        with its optimizer; evaluation uses the one that is there. Collective over all ranks."""
        trainer = module.trainer
        fitting = trainer.state.fn == TrainerFn.FITTING
        if self._made or (hasattr(module, "dualpipe_wrapper") and not fitting):
            return
        self._made = True
        if self.readers == 1:
            trainer._accelerator_connector.use_distributed_sampler = False  # all devices read all samples
        refuse_trainer(trainer, module)
        self._take_back(module, layers)
        settings = configuration(trainer, self._schedule, self._extra, module.num_chunks, fitting)
        stages = self.num_stages
        module.dualpipe_wrapper = make_module(
            module, layers, stages, self.world_size // stages, self.cluster_environment
        )
        optimizers: list[Any] = []
        schedulers: list[Any] = []
        if fitting:
            optimizers, schedulers = _init_optimizers_and_lr_schedulers(module)
            refuse_optimizers(optimizers, settings)
        with module.dualpipe_wrapper.randomness():
            make_engine(module.dualpipe_wrapper, settings, optimizers, [each.scheduler for each in schedulers])
        self._mine = optimizers, schedulers
        del module.chain
        release(layers.values(), set(module.dualpipe_wrapper.parameters()))

    def _take_back(self, module: DualPipeLightningModule, layers: dict[str, LayerEntry]) -> None:
        """Before stages are cut: all ranks have the layers, with the weights of rank 0, or of an engine before."""
        if hasattr(module, "dualpipe_wrapper"):
            before = module.dualpipe_wrapper
            state = before.whole_state_dict(everywhere=True)
            assert before.engine is not None
            before.engine.destroy()
            del module.dualpipe_wrapper
            refill(layers, state)
            module._later |= state
            module.chain = Chain(layers)
        share_start(layers.values(), self.root_device)

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.lightning_module
        if trainer.state.fn == TrainerFn.FITTING:
            self.optimizers, self.lr_scheduler_configs = self._mine
        self.setup_precision_plugin()
        follow_first(self.lightning_module.dualpipe_wrapper.made)
        metrics = [part for part in self.lightning_module.modules() if isinstance(part, Metric)]
        if alone := [part for part in metrics if part.process_group is None]:
            group = self._counting_group()
            for part in alone:
                part.process_group = group
        self.barrier()

    def teardown(self) -> None:
        """Weights stay where the engine has them, whose optimizer shares their memory."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model

    def reduce(self, tensor: Nest, group: Any = None, reduce_op: Any = "mean") -> Nest:  # noqa: ANN401
        """As DDPStrategy's; in a "sum" devices that read the same samples count once."""
        if reduce_op == "sum" and group is None and isinstance(tensor, Tensor) and not self._reads_first:
            tensor = torch.zeros_like(tensor)
        return super().reduce(tensor, group, reduce_op)

    # -- training ------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Nest:
        module = self.lightning_module
        engine = module.dualpipe_wrapper.engine
        if module.trainer.fit_loop.epoch_loop.batch_idx % module.trainer.accumulate_grad_batches == 0:
            engine.drop_gradients()  # of a step that was left out
        self.trained.clear()
        # under "16-true" and "bf16-true" the precision is the engine's own
        half = isinstance(self.precision_plugin, HalfPrecision)
        found: Nest = module.training_step(*args, **kwargs) if half else super().training_step(*args, **kwargs)
        refuse_other_loss(type(module).__name__, found, self.trained)
        return found

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return closure_loss

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Nest], model: nn.Module | None = None, **kwargs: Any
    ) -> Nest:
        def closure_before_step() -> Nest:
            self.ends_step = True
            try:
                return closure()
            finally:
                self.ends_step = False

        module = self.lightning_module
        result = self.precision_plugin._wrap_closure(module, optimizer, closure_before_step)
        engine, trainer = module.dualpipe_wrapper.made, module.trainer
        if trainer.gradient_clip_algorithm in BY_NORM and CLIPPING not in self._extra:
            clip_by_norm(engine, trainer.gradient_clip_val)
        engine.take_step()
        return result

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: it is in the engine's folder, in parts."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:  # noqa: ANN401
        if "optimizer_states" in checkpoint:
            save_engine(self.lightning_module.dualpipe_wrapper, Path(filepath))
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:  # noqa: ANN401
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            remove_engine(Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        self._loaded = Path(checkpoint_path).resolve()  # of ModelCheckpoint(save_last="link")
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self._loaded is not None
        load_engine(self.lightning_module.dualpipe_wrapper, self._loaded, self._resume_elsewhere)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        strategy_registry.register(cls.strategy_name, cls, description="DualPipe pipeline over all devices")


if DualPipeStrategy.strategy_name not in StrategyRegistry:
    DualPipeStrategy.register_strategies(StrategyRegistry)
