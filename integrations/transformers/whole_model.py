"""The whole model, of which each rank trains the weights of its stages alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dualpipe_engine.adapters.stage import Stage
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.runtime.weight_grad import Forward

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
    """The model within a PEFT model, of several kinds of adapters too, whose layers hold them."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model.base_model.model if type(model).__name__ == "PeftMixedModel" else model


def whole_names(model: Model, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the base model under their names in a PEFT model, and what that has besides: tensors that its layers
    share and nobody trains, such as the projections of VeRA. Tied weights are one tensor, which is saved once."""
    base = base_model(model)
    if base is model:
        tied = getattr(model, "all_tied_weights_keys", {})
        return state | {name: state[other] for name, other in tied.items() if name in state and other in state}
    prefix = next(name for name, part in model.named_modules() if part is base) + "."
    every = type(model).state_dict(model)  # that of the object may be refused
    besides = {name: value for name, value in every.items() if not name.startswith(prefix)}
    return besides | {prefix + name: value for name, value in state.items()}


@contextmanager
def adapters_enabled(model: Model) -> Iterator[None]:
    """Within, adapters that are switched off compute and train: those of a PEFT model in `disable_adapter()`.

    Modules of the model may be other ones afterwards.
    """
    off = [name for name, part in model.named_modules() if getattr(part, "_disable_adapters", False)]
    for name in off:
        model.get_submodule(name).enable_adapters(True)
    try:
        yield
    finally:
        for name in off:
            model.get_submodule(name).enable_adapters(False)


def hold_stages(model: Model, engine: DualPipeEngine) -> None:
    """Put the modules of this rank's stages into the model in place of those that they were made of.

    Layers of which there are two copies, and those that change ranks, are other objects than the model has had. What is
    done to the model from now on (adapters that are switched, hooks of parameters, values of dropout) reaches them so,
    and weights that train here are those of the model.

    Args:
        model: a base model.
        engine: whose layers are stages of it.
    """
    for stage in engine.module.modules():
        if isinstance(stage, Stage):
            _hold(model, stage)


def _hold(place: nn.Module, part: nn.Module) -> None:
    for name, child in part._modules.items():
        if type(child) is nn.Module:  # above what a stage owns
            _hold(place.get_submodule(name), child)
        else:
            place._modules[name] = child


def refuse_calls(model: Model, engine: DualPipeEngine) -> None:
    """Let calls of the whole model, `generate` too, its state and saving it raise a ConfigError where some of its
    weights train elsewhere.

    Args:
        model: a PEFT model too.
        engine: whose stages the model holds; see `hold_stages`.
    """
    base, here = base_model(model), {id(param) for param in engine.module.parameters()}
    if all(id(param) in here for param in base.parameters()):
        return
    others = f"this process trains some stages of the {type(base).__name__} only, other weights are those from before"

    @functools.wraps(base.forward)
    def forward(*args: object, **kwargs: object) -> None:
        raise ConfigError(
            f"{others}: use predict(), or load what save_model() has written; compute_loss is given a model to call"
        )

    base.forward = forward
    for each in (base, model):
        each.save_pretrained = functools.partial(_save_given, each.save_pretrained, others)
        each.state_dict = functools.partial(_state_of_part, each.state_dict, others)
    for name in ("merge_adapter", "merge_and_unload"):  # of a PEFT model
        if hasattr(model, name):
            setattr(model, name, functools.partial(_save_given, getattr(model, name), others))


def refuse_stages(model: Model) -> None:
    """Refuse a base model that another engine has, or of which other processes have trained a part.

    Raises:
        ConfigError: it is one.
    """
    apart = getattr(vars(model).get("state_dict"), "func", None) is _state_of_part
    if apart or any(isinstance(vars(part).get("forward"), Forward) for part in model.modules()):
        raise ConfigError(
            f"this {type(model).__name__} is in the stages of another DualPipeTrainer: go on with that one, or load "
            "what its save_model() has written by from_pretrained()"
        )


def _save_given(save: Callable[..., None], others: str, *args: Any, **options: Any) -> None:
    if options.get("state_dict") is None:
        raise _gather_first(others)
    save(*args, **options)


def _state_of_part(state_dict: Callable[..., Any], others: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401
    if "destination" not in options:  # else of a module around the model
        raise _gather_first(others)
    return state_dict(*args, **options)


def _gather_first(others: str) -> ConfigError:
    return ConfigError(f"{others}: call save_model() of the Trainer on all ranks, which gathers them")
