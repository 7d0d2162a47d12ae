"""The models' own losses as `loss_fn(output, labels)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..errors import ConfigError


def own_loss(model: nn.Module) -> Callable[[Any, Any], torch.Tensor]:
    """The loss that the model's forward computes from its logits.

    Raises:
        ConfigError: it is not known.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is not None:
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return partial(_of_tokens, cast(Any, model).loss_function, config.get_text_config().vocab_size)
        if name.endswith(("ForMaskedLM", "ForTokenClassification")):
            return _cross_entropy
        if name.endswith(("ForImageClassification", "ForSequenceClassification")):
            return partial(_of_classes, config)
    raise ConfigError(f"the loss of {name} is not known: give the PipelineModule a loss_fn(output, labels) of your own")


def _of_tokens(function: Callable[..., Any], vocabulary: int, logits: torch.Tensor, labels: Any) -> torch.Tensor:
    return function(logits=logits, labels=labels, vocab_size=vocabulary)


def _of_classes(config: Any, logits: torch.Tensor, labels: Any) -> torch.Tensor:
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
