"""Stage: the modules of a piece of a model, under the names that they have in the model, and how they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from ..comm.nest import Nest
from .losses import ModelConfig
from .runner import BlockRange, Runner


class StageSource(Protocol):
    """What a stage asks of the adapter that it is cut from (`ModelAdapter`)."""

    def fill(self, stage: Stage) -> None: ...

    def modules_of(self, spans: tuple[BlockRange, ...]) -> dict[str, nn.Module]: ...

    def description(self) -> dict[str, object]: ...

    def runner(self, span: BlockRange, owned: dict[str, nn.Module]) -> Runner: ...


class Stage(nn.Module):
    """A piece of a model as a module of its own.

    Args:
        adapter: of the model.
        spans: what it runs; `forward` runs the first, `finish` the second.

    Attributes:
        whole_model: what a checkpoint keeps of the model, for `dualpipe export`.
    """

    whole_model: dict[str, object]
    _runners: list[Runner]

    def __init__(self, adapter: StageSource, spans: tuple[BlockRange, ...]) -> None:
        super().__init__()
        owned = adapter.modules_of(spans)
        for name, module in owned.items():
            self._place(name, module)
        self.__dict__["_fill"] = adapter.fill
        self.__dict__["whole_model"] = adapter.description()
        # The runners' models share these modules and hold stubs, so they are no submodules.
        self.__dict__["_runners"] = [adapter.runner(span, owned) for span in spans]

    def forward(self, message: Nest) -> Nest:
        """Run the piece.

        Args:
            message: the batch (main input, tuple or dict) for the first piece, else what the piece before returned.

        Returns:
            What the next piece takes: a hidden state, or (hidden state, inputs that all stages need). The last piece
            returns logits (or the last hidden state); the model's whole output if the batch is a dict with labels.
        """
        return self._runners[0](message)

    def finish(self, message: Nest) -> Nest:
        """Run the second range of a piece that holds both ends of the model."""
        return self._runners[1](message)

    @property
    def config(self) -> ModelConfig:
        """The configuration of the model; None if it has none."""
        return getattr(self._runners[0].model, "config", None)

    def carried(self, message: Nest, logits: list[torch.Tensor]) -> Nest:
        """What of a message, and of the `logits` of the block's router, goes past the block of a piece that has one."""
        return self._runners[0].carried(message, logits)

    def handed_on(self, hidden: torch.Tensor, carried: Nest) -> Nest:
        """What such a piece returns when its block returns `hidden`."""
        return self._runners[0].handed_on(hidden, carried)

    def train(self, mode: bool = True) -> Stage:
        super().train(mode)
        for runner in self._runners:
            runner.model.train(mode)
        return self

    def fill(self) -> None:
        """Give weights to what is still on the meta device."""
        fill, self.__dict__["_fill"] = self.__dict__["_fill"], None
        if fill is not None:
            fill(self)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Stage:
        self.fill()  # a stage gets its weights when it is first moved to a device, so that counting is cheap
        return super()._apply(fn, recurse)

    def _place(self, name: str, module: nn.Module) -> None:
        *path, last = name.split(".")
        place: nn.Module = self
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
        place.add_module(last, module)
