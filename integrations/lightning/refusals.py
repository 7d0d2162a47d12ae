"""What Lightning offers and one DualPipe pipeline does not have: refused before training, by name."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dualpipe_engine.errors import ConfigError

#: Of a module or a callback: called around a backward of Lightning's, of which there is none.
BACKWARD = ("backward", "on_before_backward", "on_after_backward", "optimizer_zero_grad")


def refuse_layers(layers: dict[str, nn.Module]) -> None:
    """Refuse layers that write statistics in their forward: each copy of a stage sees half of a batch.

    Raises:
        ConfigError: there is such a layer.
    """
    for name, layer in layers.items():
        for part in layer.modules():
            if isinstance(part, _NormBase) and part.running_mean is not None:
                raise ConfigError(
                    f"layer {name} holds {type(part).__name__}, whose statistics would be those of half of a batch on "
                    "each copy of its stage: use a norm without running statistics (GroupNorm, LayerNorm)"
                )


def refuse_hooks(
    module: LightningModule, base: type, callbacks: list[Any], optimizers: list[Any], precision: object
) -> None:
    """Refuse hooks, optimizers and precisions that would have no effect, or another one.

    Args:
        module: the user's.
        base: the class whose own methods are none of the user's.
        callbacks: of the Trainer.
        optimizers: of the module.
        precision: the Trainer's precision plugin.

    Raises:
        ConfigError: there is such a thing.
    """
    if not module.automatic_optimization:
        raise ConfigError(
            "automatic_optimization=False steps an optimizer whose gradients this strategy has yet to add up: leave "
            "the steps to Lightning, or train by dualpipe_engine.initialize"
        )
    if len(optimizers) > 1:
        raise ConfigError(
            f"{len(optimizers)} optimizers would each see the gradients of one training_step: give one, with a group "
            "of parameters for each"
        )
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "LBFGS runs its closure several times a step, which a pipeline's batch is not: use another"
            )
    if getattr(precision, "scaler", None) is not None:
        raise ConfigError('precision="16-mixed" scales losses that this strategy does not see: use "bf16-mixed" or 32')
    for name in BACKWARD:
        if getattr(type(module), name) is not getattr(base, name):
            raise ConfigError(f"{type(module).__name__}.{name} has no place here: gradients come out of training_step")
        for callback in callbacks:
            if hasattr(callback, name) and is_overridden(name, callback):
                raise ConfigError(
                    f"{type(callback).__name__}.{name} has no place here: gradients come out of training_step; use "
                    "on_before_optimizer_step"
                )
