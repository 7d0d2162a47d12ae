"""This device's part of a model, and the engine that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dualpipe_engine.adapters.gather import gather_named
from dualpipe_engine.comm.from_all import from_all
from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.engine.placing.param_groups import PLACEHOLDER

from ..outputs import collect, of_whole_sequences, share
from ..random_streams import StageRandomness
from .batches import Micro, StageLoss, none_counts

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine

TIED = "tied_modules."  #: of names in a PipelineModule


class Pipeline(nn.Module):
    """The stages of this rank.

    Args:
        local_module: the PipelineModule, from which `initialize` makes stages.
        names: of all layers, in order.
        loss: of the last stage.

    Attributes:
        local_module: its parameters are those of this rank.
        engine: None until it is made, and in copies.
        runs: whether the stages run.
        randomness: from which stages draw, apart from the batches, which are the same on all ranks of a pipeline.
    """

    engine: DualPipeEngine | None

    def __init__(self, local_module: nn.Module, names: list[str], loss: StageLoss) -> None:
        super().__init__()
        self.local_module = local_module
        self._names, self._loss = names, loss
        vars(self)["engine"] = None  # a module too, whose weights are these
        self.runs, self.randomness = False, StageRandomness()

    def start(self, engine: DualPipeEngine) -> None:
        vars(self)["engine"] = engine

    # -- running -------------------------------------------------------------------------------------------------

    def train_step(self, micros: list[Micro], batches: int, last: bool) -> torch.Tensor:
        """The mean loss; gradients are added to those that wait for the step. Collective over all ranks."""
        engine = self._sized(micros)
        with self._running():
            loss: torch.Tensor = engine.forward_backward(iter(micros), batches=batches, last=last)
        return loss.detach().clone()

    def evaluate(self, micros: list[Micro]) -> torch.Tensor:
        """The mean loss, without gradients. Collective over all ranks."""
        with self._running():
            loss: torch.Tensor = self.made.eval_batch(iter(micros), num_micro_batches=len(micros))
        return loss.detach().clone()

    def predict(self, micros: list[Micro]) -> Nest:
        """The outputs of a batch, on all ranks of the pipeline. Collective over all ranks."""
        engine = self.made
        micros = micros if engine.sharing.group is None else none_counts(micros)
        with self._loss.keeping() as kept, self._running():
            engine.eval_batch(iter(micros), num_micro_batches=len(micros))
        return share(of_whole_sequences(collect(kept, engine), engine), engine)

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.runs = True
        try:
            with self.randomness():
                yield
        finally:
            self.runs = False

    def _sized(self, micros: list[Micro]) -> DualPipeEngine:
        engine = self.made
        if engine.gradient_accumulation_steps() != len(micros):
            rows = engine.train_micro_batch_size_per_gpu() * engine.data_replicas
            engine.set_train_batch_size(len(micros) * rows)
        return engine

    @property
    def made(self) -> DualPipeEngine:
        """The engine, which is there."""
        assert self.engine is not None
        return self.engine

    # -- weights under the names of the model --------------------------------------------------------------------

    def whole_name(self, name: str) -> str:
        """What a tensor of `local_module` is called in the model."""
        number, _, rest = name.partition(".")
        return f"{self._names[int(number)]}.{rest}" if number.isdigit() else name

    def whole_names(self) -> Iterator[tuple[str, str]]:
        """Names of the weights and persistent buffers of this rank, here and in the model."""
        for name in self.local_module.state_dict():
            if not name.startswith(PLACEHOLDER):
                yield name, self.whole_name(name)

    def is_elsewhere(self, name: str) -> bool:
        """Whether a name of the model is one of a layer that other ranks hold."""
        here = {whole for _, whole in self.whole_names()}
        known = name.startswith(TIED) or any(name.startswith(f"{layer}.") for layer in self._names)
        return known and name not in here

    def whole_state_dict(self, everywhere: bool = False) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers of the whole model, on the CPU. Collective over all ranks.

        Args:
            everywhere: give all ranks a copy, not rank 0 alone.
        """
        state = self.local_module.state_dict()
        mine = {whole: state[name].detach().to("cpu", copy=True) for name, whole in self.whole_names()}
        if not everywhere:
            return gather_named(mine)
        return {name: tensor for part in from_all(mine) for name, tensor in part.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Pipeline:
        """A copy of the weights of this rank, for callbacks that average them; it runs nothing."""
        copied = Pipeline(_weights_alone(self.local_module), self._names, self._loss)
        memo[id(self)] = copied
        return copied


def _weights_alone(module: nn.Module) -> nn.Module:
    """Modules that hold copies of weights and buffers under the same names, in the same order."""
    copied = nn.Module()
    for name, param in module._parameters.items():
        copied.register_parameter(
            name, None if param is None else nn.Parameter(param.detach().clone(), param.requires_grad)
        )
    for name, buffer in module._buffers.items():
        persistent = name not in module._non_persistent_buffers_set
        copied.register_buffer(name, None if buffer is None else buffer.detach().clone(), persistent)
    for name, part in module._modules.items():
        copied.add_module(name, None if part is None else _weights_alone(part))
    return copied
