"""The models' own losses as `loss_fn(output, labels)`: each function takes a model and returns its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from ..comm.nest import Nest
from ..errors import ConfigError
from ..runtime.tiles import Tiles

IGNORED = -100  #: label of tokens that do not count, as in all of transformers

PretrainedModel: TypeAlias = Any
"""A model of transformers, whose attributes depend on its class."""

ModelConfig: TypeAlias = Any
"""A configuration of transformers, whose fields depend on the model."""

LossFn: TypeAlias = Callable[[Nest, Nest], torch.Tensor]
"""Of the output of the last layer and the labels (scalar)."""


def of_tokens(model: PretrainedModel) -> LossFn:
    """Of language models, whose logits `[batch, length, vocabulary]` tell the next token."""
    return TokenLoss(model.loss_function, model.config.get_text_config().vocab_size)


def of_rows(model: PretrainedModel) -> LossFn:
    """Cross-entropy of every position, `[..., classes]`."""
    return _cross_entropy


def of_classes(model: PretrainedModel) -> LossFn:
    """Of a whole sample, `[batch, labels]`, as the configuration's `problem_type` says."""
    return partial(_of_classes, model.config)


@dataclass(frozen=True)
class TokenLoss:
    """The loss of a language model.

    Args:
        function: of transformers, which shifts the labels.
        vocabulary: entries of the vocabulary.
    """

    function: Callable[..., torch.Tensor]
    vocabulary: int

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.function(logits=logits, labels=labels, vocab_size=self.vocabulary)

    def tiled(self, tiles: Tiles) -> LossFn:
        """The same over tiles of the sequence.

        Raises:
            ConfigError: the function does not take labels that are shifted before, and their number.
        """
        known = inspect.signature(self.function).parameters
        if "shift_labels" not in known or "num_items_in_batch" not in known:
            raise ConfigError(
                f'"tiled_loss": {self.function.__name__} of transformers does not work on pieces of a sequence: leave '
                'out "tiled_loss"'
            )
        return partial(self._of_tiles, tiles)

    def _of_tiles(self, tiles: Tiles, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        shifted = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        number = (shifted != IGNORED).sum()

        def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            of_tokens = {"labels": None, "shift_labels": labels.contiguous(), "num_items_in_batch": number}
            return self.function(logits=logits, vocab_size=self.vocabulary, **of_tokens)

        return tiles.total(summed, hidden, shifted)


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
