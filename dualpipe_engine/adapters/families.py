"""Families: what is known of models by the names of their classes, beyond what a probe forward shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ..errors import ConfigError
from .losses import LossFn, PretrainedModel, of_classes, of_rows, of_tokens


class Family(NamedTuple):
    """Models that are used alike.

    Args:
        endings: of the names of their classes.
        loss: from a model, which has a `config`, to its own loss.
        embeds_only: whether token ids are for the embedding alone; of other models they travel to every stage.
        by_token: whether outputs belong to single tokens, made from the hidden states of these alone.
        routed: those (`config.model_type`) whose auxiliary loss over routers is that of `routed.RouterLoss`.
    """

    endings: tuple[str, ...]
    loss: Callable[[PretrainedModel], LossFn]
    embeds_only: bool = False
    by_token: bool = False
    routed: tuple[str, ...] = ()


#: The first that fits counts.
FAMILIES = [
    Family(
        ("ForCausalLM", "LMHeadModel"),
        of_tokens,
        embeds_only=True,
        by_token=True,
        routed=("gpt_oss", "mixtral", "qwen3_moe"),
    ),
    Family(tuple(f"{name}ForConditionalGeneration" for name in ("Llava", "Qwen2VL", "Qwen3VL")), of_tokens),
    Family(("ForMaskedLM",), of_rows, embeds_only=True, by_token=True),
    Family(("ForTokenClassification",), of_rows, by_token=True),
    Family(("ForImageClassification", "ForSequenceClassification"), of_classes),
]


def register_family(family: Family) -> None:
    """Let adapters know more models; what is registered last comes first."""
    FAMILIES.insert(0, family)


def family_of(model: nn.Module) -> Family | None:
    """The family of a model; None if its class is of none."""
    name = type(model).__name__
    return next((family for family in FAMILIES if name.endswith(family.endings)), None)


def makes_loss_itself(model: nn.Module) -> bool:
    """Whether its class is one of transformers whose forward computes the loss of its family, or another."""
    family, config = family_of(model), getattr(model, "config", None)
    return family is not None and family.loss in (of_tokens, of_rows, of_classes) and hasattr(config, "problem_type")


def own_loss(model: nn.Module) -> LossFn:
    """The loss that the model's forward computes from its logits.

    Raises:
        ConfigError: it is not known.
    """
    family = family_of(model)
    if family is None or getattr(model, "config", None) is None:
        raise ConfigError(
            f"the loss of {type(model).__name__} is not known: give the PipelineModule a loss_fn(output, labels) of "
            "your own"
        )
    return family.loss(model)
