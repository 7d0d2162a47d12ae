"""The whole model, of which each rank trains the weights of its stages alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from dualpipe_engine.errors import ConfigError

from .batches import Model

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine


class Pipeline:
    """What the Trainer's loop holds as its wrapped model: the engine does the work."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._model, name)

    def __call__(self, *args: object, **kwargs: object) -> None:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "the stages run the model, in training_step and prediction_step of DualPipeTrainer: override compute_loss, "
            "which is given a model to call"
        )

    def train(self, mode: bool = True) -> Pipeline:
        self._model.train(mode)
        return self

    def eval(self) -> Pipeline:
        return self.train(False)

    def to(self, *args: Any, **kwargs: Any) -> Pipeline:
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


def base_model(model: Model) -> Model:
    """The model within a PEFT model, whose layers hold the adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def whole_names(model: Model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the base model's weights in a PEFT model."""
    base = base_model(model)
    if base is model:
        return state
    prefix = next(name for name, part in model.named_modules() if part is base)
    return {f"{prefix}.{name}": value for name, value in state.items()}


def refuse_calls(model: Model, engine: DualPipeEngine) -> None:
    """Let calls of the whole model, `generate` too, raise a ConfigError where some of its weights train elsewhere.

    Args:
        model: a base model.
        engine: whose stages share the modules of the model; they were made before.
    """
    here = {id(param) for param in engine.module.parameters()}
    if all(id(param) in here for param in model.parameters()):
        return

    @functools.wraps(model.forward)
    def forward(*args: object, **kwargs: object) -> None:
        raise ConfigError(
            f"this process trains some stages of the {type(model).__name__} only, other weights are those from before: "
            "use predict(), or load what save_model() has written; compute_loss is given a model to call"
        )

    model.forward = forward
