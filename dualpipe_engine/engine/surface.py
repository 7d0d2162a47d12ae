"""Surface: what a client of DeepSpeed's engine sees of a DualPipeEngine.

A client is shown the pipeline that it has asked for: `grid`, `num_stages` and `stage_id` count the ranks of one
pipeline, also where two of them hold the same stages. The methods that the engine inherits see it too. What cannot work
is refused (`methods.REFUSED`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import NoReturn

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.utils.timer import ThroughputTimer

from ..comm.nest import Nest
from ..errors import ConfigError, MissingAttributeError
from .given import EngineAttribute
from .methods import REFUSED, REFUSED_ATTRIBUTES
from .placing.grid import Place
from .placing.sequences import Sharing


class Surface(PipelineEngine):
    """The part of `DualPipeEngine` that answers clients."""

    place: Place
    sharing: Sharing

    def _init_pipeline_state(self, base_grid: PipelineParallelGrid) -> None:
        """What the inherited methods of PipelineEngine read."""
        self.enable_backward_allreduce = False
        self.pipeline_enable_backward_allreduce = True
        self.using_bf16_optimizer = type(self.optimizer) is BF16_Optimizer
        self.grid = base_grid
        self.global_rank = self.grid.get_global_rank()
        self.num_stages = self.grid.pipe_parallel_size
        self.stage_id = self.place.rank
        self.prev_stage, self.next_stage = self.stage_id - 1, self.stage_id + 1
        self.dynamic_shape, self.has_bool_tensors = self.module.dynamic_shape, False
        self.has_attention_mask = False
        self.is_pipe_parallel = self.place.placement.num_ranks > 1
        self.is_data_parallel = self.place.replicas > 1
        self.is_model_parallel = self.grid.model_parallel_size > 1
        self.micro_batch_size = self.train_micro_batch_size_per_gpu()
        self.micro_batches = self.gradient_accumulation_steps()
        self.data_iterator: Iterator[Nest] | None = None
        self.batch_fn = None
        self.agg_train_loss: torch.Tensor | None = None
        self.agg_additional_losses: OrderedDict[str, torch.Tensor] | None = None
        self.dp_group_loss = torch.zeros((), device=self.device)
        self._force_grad_boundary = False
        self._checked_stream = False
        self.batch_timer = ThroughputTimer(
            self._config.timers_config,
            batch_size=self.train_batch_size(),
            logging_fn=self.tput_log,
            monitor_memory=False,
            steps_per_output=self.steps_per_print(),
        )
        # Stages run through views, whose hooks are these; the engine's own forward does not exist here.
        self.module_forward_pre_hook.remove()
        self.module_forward_post_hook.remove()
        self.module.checkpoint_parallel_write_pipeline = self._config.checkpoint_parallel_write_pipeline

    def __getattr__(self, name: str) -> EngineAttribute:
        if name in REFUSED_ATTRIBUTES:
            raise MissingAttributeError(
                f"engine.{name} belongs to DeepSpeed's instruction schedule, which does not run here; "
                "train_batch() and eval_batch() return losses and outputs"
            )
        return super().__getattr__(name)

    @property
    def reads_inputs(self) -> bool:
        """Whether this rank reads the inputs of micro-batches; in a bidirectional pipeline both ends do."""
        return self.place.reads_inputs

    @property
    def reads_labels(self) -> bool:
        """Whether this rank reads labels and computes losses; in a bidirectional pipeline both ends do, and where the
        stages come back to the first rank it does."""
        return self.place.reads_labels

    @property
    def data_rank(self) -> int:
        """Number of this rank's replica of the pipeline: shard training data by it. Replicas that share sequences have
        one number."""
        return self.place.replica // self.sharing.size

    @property
    def data_replicas(self) -> int:
        """Replicas of the pipeline; those that share sequences count as one."""
        return self.place.replicas // self.sharing.size

    def get_data_parallel_rank(self) -> int:
        return self.place.replica

    def get_model_parallel_rank(self) -> int:
        rank: int = self.grid.get_model_parallel_rank()
        return rank

    def get_tensor_parallel_rank(self) -> int:
        rank: int = self.grid.get_slice_parallel_rank()
        return rank

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the batch size by changing the number of micro-batches.

        Raises:
            ValueError: it is no multiple of micro-batch size and replicas.
        """
        _check_positive("train_batch_size", train_batch_size)
        steps, rest = divmod(train_batch_size, self.train_micro_batch_size_per_gpu() * self.data_replicas)
        if rest:
            raise ValueError(
                f"train_batch_size {train_batch_size} must be a multiple of train_micro_batch_size_per_gpu "
                f"{self.train_micro_batch_size_per_gpu()} x {self.data_replicas} replicas"
            )
        self._config.train_batch_size = train_batch_size
        self._config.gradient_accumulation_steps = steps
        self.micro_batches = steps

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples of a micro-batch, and with them those of a batch.

        Raises:
            ValueError: it is no whole number from 1.
        """
        _check_positive("train_micro_batch_size_per_gpu", micro_batch_size)
        self._config.train_batch_size = micro_batch_size * self.micro_batches * self.data_replicas
        self._config.train_micro_batch_size_per_gpu = self.micro_batch_size = micro_batch_size


def _check_positive(name: str, number: int) -> None:
    if not isinstance(number, Integral) or number < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {number!r}")


def _refusal(name: str, why: str) -> Callable[..., NoReturn]:
    def refuse(self: Surface, *args: object, **kwargs: object) -> NoReturn:
        raise ConfigError(f"{name}() cannot work under a schedule: {why}")

    refuse.__name__ = name
    refuse.__doc__ = f"Raises ConfigError: {why}."
    return refuse


for _name, _why in REFUSED.items():
    setattr(Surface, _name, _refusal(_name, _why))
