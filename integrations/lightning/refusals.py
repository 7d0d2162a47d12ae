"""What Lightning offers and a pipeline does not have: refused before training, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.moe.utils import is_moe_param
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.utilities.model_helpers import is_overridden

from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.errors import ConfigError

from ..optimizers import refuse_optimizer

if TYPE_CHECKING:
    from .module import DualPipeLightningModule

#: Of a module or a callback: called around a backward of Lightning's, of which there is none.
BACKWARD = ("backward", "on_before_backward", "on_after_backward", "optimizer_zero_grad")
#: Callbacks that change or copy the whole model, and what to do instead.
CALLBACKS: dict[type[Callback], str] = {
    StochasticWeightAveraging: "copies a model that is cut afterwards: use WeightAveraging or EMAWeightAveraging",
    BaseFinetuning: "adds groups to an optimizer whose state is partitioned: freeze with requires_grad_ before fit",
    ModelPruning: "replaces weights that the engine's optimizer steps: prune the trained nn.Sequential",
}


def refuse_trainer(trainer: Trainer, module: DualPipeLightningModule) -> None:
    """Refuse hooks, callbacks and arguments that would have no effect, or another one.

    Args:
        trainer: with its callbacks.
        module: the user's.

    Raises:
        ConfigError: there is such a thing.
    """
    from .module import DualPipeLightningModule

    refuse_hooks(module, DualPipeLightningModule, trainer.callbacks)
    if module._compiler_ctx is not None or module._compiled_call_impl is not None:
        raise ConfigError(
            f"the {type(module).__name__} is compiled as a whole, but its stages run apart: give fit the module as it "
            "was, and call self.dualpipe_wrapper.engine.compile() in on_fit_start"
        )
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise ConfigError(
            "sync_batchnorm=True puts layers in place of others whose forwards would wait for ranks of other stages: "
            "leave it out"
        )
    layers = {id(param) for param in module.chain.parameters()} if hasattr(module, "chain") else set()
    held = module.dualpipe_wrapper if hasattr(module, "dualpipe_wrapper") else None
    layers |= {id(param) for param in held.parameters()} if held is not None else set()
    for name, param in module.named_parameters():
        if id(param) not in layers and param.requires_grad:
            raise ConfigError(
                f"{name} is in no layer of the model, so that no stage would train it: make it part of a layer"
            )
    for name, param in module.named_parameters():
        if is_moe_param(param):
            raise ConfigError(
                f"{name} is of experts that ranks share: train by dualpipe_engine.initialize, or by DualPipeTrainer"
            )


def refuse_hooks(module: DualPipeLightningModule, base: type, callbacks: list[Any]) -> None:
    """Refuse what a module overrides or a callback does without an effect here.

    Args:
        module: the user's.
        base: the class whose own methods are none of the user's.
        callbacks: of the Trainer.

    Raises:
        ConfigError: there is such a thing.
    """
    kind = type(module)
    if not module.automatic_optimization:
        raise ConfigError(
            "automatic_optimization=False steps an optimizer whose gradients the engine has yet to reduce: leave the "
            "steps to Lightning, or train by dualpipe_engine.initialize"
        )
    if kind.configure_gradient_clipping is not base.configure_gradient_clipping:  # type: ignore[attr-defined]
        raise ConfigError(
            f"{kind.__name__}.configure_gradient_clipping sees the gradients of some stages only: set "
            "Trainer(gradient_clip_val=...)"
        )
    for name in BACKWARD:
        if getattr(kind, name) is not getattr(base, name):
            raise ConfigError(f"{kind.__name__}.{name} has no place here: gradients come out of training_step")
        for callback in callbacks:
            if hasattr(callback, name) and is_overridden(name, callback):
                raise ConfigError(
                    f"{type(callback).__name__}.{name} has no place here: gradients come out of training_step; use "
                    "on_before_optimizer_step"
                )
    for callback in callbacks:
        for refused, why in CALLBACKS.items():
            if isinstance(callback, refused):
                raise ConfigError(f"{type(callback).__name__} {why}")


def refuse_optimizers(optimizers: list[Any], settings: Mapping[str, Any]) -> None:
    """Refuse optimizers that give other numbers here.

    Args:
        optimizers: of the module.
        settings: DeepSpeed's configuration.

    Raises:
        ConfigError: there is none, there are several, or it is one of those.
    """
    if len(optimizers) > 1:
        raise ConfigError(
            f"{len(optimizers)} optimizers would each see the gradients of one training_step: give one, with a group "
            "of parameters for each"
        )
    if not optimizers or isinstance(optimizers[0], _MockOptimizer):
        raise ConfigError("configure_optimizers must return an optimizer, which the engine steps")
    if isinstance(optimizers[0], torch.optim.LBFGS):
        raise ConfigError("LBFGS runs its closure several times a step, which a pipeline's batch is not: use another")
    stage = settings["zero_optimization"].get("stage", 0)
    low = any(settings.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
    refuse_optimizer(type(optimizers[0]).__name__, bool(stage or low))


def refuse_other_loss(name: str, found: Nest, trained: list[torch.Tensor]) -> None:
    """Refuse a `training_step` whose loss is not the one whose gradients there are.

    Args:
        name: of the module's class.
        found: what `training_step` has returned.
        trained: losses (scalars) of the batches that it has trained on.

    Raises:
        ConfigError: it has trained on no batch or on several, or returns another loss.
    """
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if len(trained) != 1 or not isinstance(loss, torch.Tensor) or not _same(loss, trained[0]):
        raise ConfigError(
            f"{name}.training_step must call pipeline_step(batch) once and return its loss, whose gradients are there: "
            "put factors and other terms into criterion"
        )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.device == other.device and torch.equal(one.detach(), other))
