"""What TRL asks of a model in place of logits: log-probabilities and a few numbers of each token.

TRL calls a model with `fused_lm_head=True`, which computes them without the logits of the whole batch. The last stage
has logits of a micro-batch, from which they are computed here; `loss.StandIn` says the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from dualpipe_engine.comm.nest import Nest

from ..transformers.loss import StandIn

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def fused(logits: torch.Tensor, labels: torch.Tensor) -> FusedCausalLMOutput:
    """Of each next token.

    Args:
        logits: [rows, tokens, vocabulary].
        labels: [rows, tokens], -100 where a token does not count.

    Returns:
        Fields [rows, tokens - 1], zero where a token does not count; a gradient has `log_probs` alone.
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    mask = labels != -100
    safe = labels.masked_fill(~mask, 0)
    logs = logits.log_softmax(-1)
    with torch.no_grad():
        numbers = {
            "entropy": -(logs.exp() * logs).sum(-1),
            "log_sum_sq_probs": (2 * logs).logsumexp(-1),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == safe,
        }
    numbers["log_probs"] = logs.gather(-1, safe.unsqueeze(-1)).squeeze(-1)
    return FusedCausalLMOutput(
        **{name: value.masked_fill(~mask, 0) for name, value in numbers.items()}, label_mask=mask
    )


class FusedStandIn(StandIn):
    """A `StandIn` with a fused head.

    Args:
        kept: where the fields of a micro-batch go, by its number.
        options: as for `StandIn`.
    """

    def __init__(self, *options: Any, kept: dict[int, Nest]) -> None:
        super().__init__(*options)
        self._fields = kept

    def __call__(self, *args: object, **given: Any) -> Nest:
        if not given.pop("fused_lm_head", False):
            return super().__call__(*args, **given)
        labels = given.pop("labels")
        logits: Any = super().__call__(*args, **given).logits
        found = fused(logits, labels)
        if self._number is not None:
            self._fields[self._number] = {name: found[name].detach() for name in FIELDS}
        return found


class Whole:
    """The model of a whole batch whose fields are there already."""

    def __init__(self, fields: dict[str, torch.Tensor]) -> None:
        self._fields = fields

    def __call__(self, *args: object, **given: object) -> FusedCausalLMOutput:
        return FusedCausalLMOutput(**self._fields)
