"""The models' own losses as `loss_fn(output, labels)`: each function takes a model and returns its loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from ..comm.nest import Nest

PretrainedModel: TypeAlias = Any
"""A model of transformers, whose attributes depend on its class."""

ModelConfig: TypeAlias = Any
"""A configuration of transformers, whose fields depend on the model."""

LossFn: TypeAlias = Callable[[Nest, Nest], torch.Tensor]
"""Of the output of the last layer and the labels (scalar)."""


def of_tokens(model: PretrainedModel) -> LossFn:
    """Of language models, whose logits `[batch, length, vocabulary]` tell the next token."""
    return partial(_of_tokens, model.loss_function, model.config.get_text_config().vocab_size)


def of_rows(model: PretrainedModel) -> LossFn:
    """Cross-entropy of every position, `[..., classes]`."""
    return _cross_entropy


def of_classes(model: PretrainedModel) -> LossFn:
    """Of a whole sample, `[batch, labels]`, as the configuration's `problem_type` says."""
    return partial(_of_classes, model.config)


def _of_tokens(
    function: Callable[..., torch.Tensor], vocabulary: int, logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    return function(logits=logits, labels=labels, vocab_size=vocabulary)


def _of_classes(config: ModelConfig, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    kind = config.problem_type
    if kind is None:
        whole = labels.dtype in (torch.long, torch.int)
        kind = "regression" if config.num_labels == 1 else "single" if whole else "multi"
    if kind.startswith("regression"):
        return nn.functional.mse_loss(logits.squeeze(), labels.squeeze())
    if kind.startswith("single"):
        return nn.functional.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1))
    return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
