"""Surface: what a client of DeepSpeed's engine sees of a DualPipeEngine.

A client is shown the pipeline that it has asked for: `grid`, `num_stages` and `stage_id` count the ranks of one
pipeline, also where two of them hold the same stages. What cannot work is refused (`methods.REFUSED`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from deepspeed.runtime.pipe.engine import PipelineEngine

from ..errors import ConfigError, MissingAttributeError
from .methods import REFUSED, REFUSED_ATTRIBUTES
from .placing.grid import Place


class Surface(PipelineEngine):
    """The part of `DualPipeEngine` that answers clients."""

    place: Place

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
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
        """Number of this rank's replica of the pipeline: shard training data by it."""
        return self.place.replica

    @property
    def data_replicas(self) -> int:
        """Replicas of the pipeline."""
        return self.place.replicas

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
        steps, rest = divmod(train_batch_size, self.train_micro_batch_size_per_gpu() * self.place.replicas)
        if rest or steps < 1:
            raise ValueError(
                f"train_batch_size {train_batch_size} must be a multiple of train_micro_batch_size_per_gpu "
                f"{self.train_micro_batch_size_per_gpu()} x {self.place.replicas} replicas"
            )
        self._config.train_batch_size = train_batch_size
        self._config.gradient_accumulation_steps = steps
        self.micro_batches = steps

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples of a micro-batch, and with them those of a batch."""
        self._config.train_batch_size = micro_batch_size * self.micro_batches * self.place.replicas
        self._config.train_micro_batch_size_per_gpu = self.micro_batch_size = micro_batch_size


def _refusal(name: str, why: str) -> Callable[..., NoReturn]:
    def refuse(self: Surface, *args: object, **kwargs: object) -> NoReturn:
        raise ConfigError(f"{name}() cannot work under a schedule: {why}")

    refuse.__name__ = name
    refuse.__doc__ = f"Raises ConfigError: {why}."
    return refuse


for _name, _why in REFUSED.items():
    setattr(Surface, _name, _refusal(_name, _why))
