"""The loss of a PipelineModule, which may be a module of it."""

from __future__ import annotations

from deepspeed.pipe import PipelineModule
from torch import nn

from ..given import LossFunction


def replace_loss(module: PipelineModule, loss_fn: LossFunction) -> None:
    """Let `module.loss_fn` be a function made of the one that the user gave. Where that is a module, it stays one of
    this: its weights train, and are saved. To undo it, set `loss_fn` to what it was."""
    vars(module)["loss_fn"] = loss_fn  # found before the modules of the same name


def loss_module(module: PipelineModule) -> nn.Module | None:
    """The loss that the user gave, if it is a module."""
    return module._modules.get("loss_fn")
