"""Adapters that users add, and models that cannot be one chain."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from ..errors import ConfigError
from .peft_kinds import refuse_adapters

Adapter: TypeAlias = Any
"""A `ModelAdapter`, or what a user has put in its place."""

#: Model class -> makes its adapter. What `register_adapter` fills; there is one set of model classes in a process.
_ADDED: dict[type[nn.Module], Callable[[nn.Module], Adapter]] = {}


def register_adapter(model_class: type[nn.Module], make: Callable[[nn.Module], Adapter]) -> None:
    """Let `get_model_adapter` use `make(model)` for models of a class and its subclasses.

    Args:
        model_class: the class.
        make: returns a `ModelAdapter`, for example one with a `Chain` that the probe does not find.
    """
    _ADDED[model_class] = make


def added_adapter(model: nn.Module) -> Callable[[nn.Module], Adapter] | None:
    """What was registered for the model's class, or for the nearest of its bases."""
    return next((_ADDED[base] for base in type(model).__mro__ if base in _ADDED), None)


def refuse_unfit(model: nn.Module) -> None:
    """Refuse what the probe cannot see.

    Raises:
        ConfigError: the model is an encoder with a decoder, skips blocks at random, or has adapters that are more than
            a change of its blocks.
    """
    refuse_adapters(model)
    config = getattr(model, "config", None)
    reads = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False) and any(name.startswith("decoder_") for name in reads):
        raise ConfigError(
            f"{type(model).__name__} is no single chain: it is an encoder-decoder model, and every block of its "
            "decoder reads the encoder's output as well as the hidden state"
        )
    configs = {
        id(each): each for each in (getattr(part, "config", None) for part in model.modules()) if each is not None
    }
    for owner in (*configs.values(), *model.modules()):
        for name, share in getattr(owner, "__dict__", {}).items():
            if name.endswith("layerdrop") and isinstance(share, float) and share > 0.0:
                raise ConfigError(
                    f"{type(model).__name__} skips blocks at random in training ({name}={share}), and stages would not "
                    f"skip the same: set {name}=0.0 in the configuration that the model is built from"
                )
