"""Optimizers: what one of them cannot step under a schedule is refused before it is made."""

from __future__ import annotations

import inspect

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from ..given import Optimizer
from .agreement import raise_everywhere


def check_optimizer(model: PipelineModule, optimizer: Optimizer, settings: DeepSpeedConfig) -> None:
    """Refuse an optimizer that runs the model again, and sparse gradients where they are laid end to end.

    Collective over all ranks.

    Args:
        model: the module, placed.
        optimizer: of the client; None: the one that the configuration names.
        settings: DeepSpeed's.

    Raises:
        ConfigError: the same on every rank.
    """
    name = settings.optimizer_name if optimizer is None else type(optimizer).__name__
    step = getattr(getattr(torch.optim, name or "", None) if optimizer is None else optimizer, "step", None)
    closure = None if step is None else inspect.signature(step).parameters.get("closure")
    wrong = []
    if closure is not None and closure.default is inspect.Parameter.empty:
        wrong.append(
            f"{name} computes the loss several times a step, and a schedule runs a batch once: take an "
            "optimizer whose step() needs no closure"
        )
    if settings.zero_enabled or settings.float16_config.enabled or settings.bfloat16_config.enabled:
        wrong += [
            f"{name} has sparse gradients, which ZeRO, fp16 and bf16 lay end to end with others: make the "
            f'{type(part).__name__} with sparse=False, or use "zero_optimization": {{"stage": 0}} in fp32'
            for name, part in model.named_modules()
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse and part.weight.requires_grad
        ]
    raise_everywhere(wrong)
