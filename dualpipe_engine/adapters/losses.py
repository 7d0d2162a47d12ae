"""The models' own losses as `loss_fn(output, labels)`: each function takes a model and returns its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from ..comm.nest import Nest
from ..engine.batches.shards import IGNORED, PartLoss, next_tokens, weighed
from ..errors import ConfigError
from ..runtime.tiles import Tiles

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
        tiles: over which it runs, on hidden states in place of logits; None: on logits.
        shifts: whether labels are those of the tokens themselves; else of the next ones.
    """

    function: Callable[..., torch.Tensor]
    vocabulary: int
    tiles: Tiles | None = None
    shifts: bool = True

    def __call__(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.tiles is None and self.shifts:
            return self.function(logits=output, labels=labels, vocab_size=self.vocabulary)
        following = next_tokens(labels) if self.shifts else labels
        if self.tiles is None:
            return self._of_next(output, following)
        return self.tiles.total(partial(self._of_next, number=(following != IGNORED).sum()), output, following)

    def tiled(self, tiles: Tiles) -> LossFn:
        """The same over tiles of the sequence.

        Raises:
            ConfigError: the function does not take labels that are shifted before, and their number.
        """
        self._check_pieces("tiled_loss")
        return replace(self, tiles=tiles)

    def of_parts(self) -> PartLoss:
        """The same of parts of sequences, whose labels have been shifted.

        Raises:
            ConfigError: the function does not take labels that are shifted before.
        """
        self._check_pieces("sequence_parallel_size")
        return weighed(replace(self, shifts=False))

    def _check_pieces(self, key: str) -> None:
        known = inspect.signature(self.function).parameters
        if "shift_labels" not in known or "num_items_in_batch" not in known:
            raise ConfigError(
                f'"{key}": {self.function.__name__} of transformers does not work on pieces of a sequence: leave out '
                f'"{key}"'
            )

    def _of_next(self, logits: torch.Tensor, labels: torch.Tensor, number: torch.Tensor | None = None) -> torch.Tensor:
        """Of labels of the next tokens: the mean, or the sum divided by `number`."""
        of_tokens = {"labels": None, "shift_labels": labels.contiguous(), "num_items_in_batch": number}
        return self.function(logits=logits, vocab_size=self.vocabulary, **of_tokens)


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
