"""Routed models: the auxiliary loss over the routers of all blocks, of which a stage has some.

The loss multiplies two averages over the tokens of all blocks, so it is no sum over stages. What adds up is what the
averages are made of: for each expert the tokens that chose it and the probabilities that it was given, and the number
of rows. These travel with the hidden state, the probabilities with a gradient, and the last stage makes the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..comm.nest import Nest
from ..engine.batches.shards import PartLoss, ShardLabels, of_shards, shifts
from ..errors import ConfigError
from ..models.autoep.layer import SharedMoE
from ..runtime.tiles import TileableLoss, Tiles
from .families import FAMILIES, family_of
from .losses import LossFn, PretrainedModel
from .runner import Runner
from .stubs import first_tensor

SUMS = "router_sums:"  #: name of the sums within a message


class Sums(NamedTuple):
    """Over the blocks so far.

    Args:
        tokens: [experts], how often each was chosen.
        probabilities: [experts], summed over tokens.
        rows: [1], tokens.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor
    rows: torch.Tensor


class RouterLoss:
    """What the auxiliary loss of a model is made from.

    Args:
        model: a transformers model with `output_router_logits` set.

    Attributes:
        weight: factor of the loss.

    Raises:
        ConfigError: the model's auxiliary loss is not known.
    """

    def __init__(self, model: PretrainedModel) -> None:
        family = family_of(model)
        routers = getattr(model, "_can_record_outputs", None) or {}
        known = [name for each in FAMILIES for name in each.routed]
        fits = family is not None and model.config.model_type in family.routed
        if not fits or not hasattr(model, "router_aux_loss_coef") or "router_logits" not in routers:
            raise ConfigError(
                f"{type(model).__name__}: the auxiliary loss multiplies averages over the routers of all layers, which "
                f"no stage sees; it is known how to carry it for the language models of {', '.join(known)}: set "
                "output_router_logits=False in the configuration"
            )
        self._kind, self._index = routers["router_logits"].target_class, routers["router_logits"].index
        self._experts, self._top_k = int(model.num_experts), int(model.num_experts_per_tok)
        self.weight = float(model.router_aux_loss_coef)

    @contextmanager
    def heard(self, model: nn.Module) -> Iterator[list[torch.Tensor]]:
        """The logits `[tokens, experts]` of the routers that run in the body, in their order."""
        found: list[torch.Tensor] = []

        def hook(router: nn.Module, args: Nest, output: Nest) -> None:
            found.append(output[self._index] if isinstance(output, tuple) else output)

        routers = [part for part in model.modules() if isinstance(part, self._kind)]
        routers += [part.router.gate for part in model.modules() if isinstance(part, SharedMoE)]  # in their place
        hooks = [router.register_forward_hook(hook) for router in routers]
        try:
            yield found
        finally:
            for each in hooks:
                each.remove()

    def add(self, sums: Sums | None, logits: torch.Tensor, mask: torch.Tensor | None) -> Sums:
        """The sums with those of one more block.

        Args:
            sums: of the blocks before.
            logits: [tokens, experts].
            mask: [batch, length], 0 for tokens that do not count.
        """
        scores = logits.softmax(dim=-1)
        chosen = scores.topk(self._top_k, dim=-1).indices
        scores = scores.float()
        counted = scores.new_ones(len(scores)) if mask is None else mask.reshape(-1).to(scores)
        tokens = scores.new_zeros(self._experts).index_add(0, chosen.flatten(), counted.repeat_interleave(self._top_k))
        scores = scores if mask is None else scores * counted.unsqueeze(-1)
        new = Sums(tokens, scores.sum(dim=0), counted.sum().view(1))
        return new if sums is None else Sums(*(before + more for before, more in zip(sums, new, strict=True)))

    def loss(self, sums: Sums) -> torch.Tensor:
        """The auxiliary loss, not weighted (scalar)."""
        return (sums.tokens / sums.rows * (sums.probabilities / sums.rows)).sum() * self._experts

    def with_loss(self, own: LossFn) -> LossFn:
        """`own` for outputs `(logits, auxiliary loss)`."""
        return WeightedLoss(own, self.weight)


@dataclass(frozen=True)
class WeightedLoss:
    """The loss of `(logits, auxiliary loss)`.

    Args:
        own: of the logits.
        weight: of the auxiliary loss.
    """

    own: LossFn
    weight: float

    def __call__(self, output: Nest, labels: Nest) -> torch.Tensor:
        logits, auxiliary = output
        return self.own(logits, labels) + self.weight * auxiliary

    @property
    def shifts(self) -> bool:
        return shifts(self.own)

    def of_parts(self) -> PartLoss:
        """The same of parts of sequences; their auxiliary loss is that of whole ones."""
        own = of_shards(self.own)

        def of_part(output: Nest, shard: ShardLabels) -> torch.Tensor:
            logits, auxiliary = output
            return own(logits, shard) + self.weight * auxiliary

        return of_part

    def tiled(self, tiles: Tiles) -> LossFn:
        """The same over tiles of the sequence.

        Raises:
            ConfigError: the loss of the logits is not known to be a sum over tokens.
        """
        if not isinstance(self.own, TileableLoss):
            raise ConfigError('"tiled_loss" takes the model\'s own loss only: leave it out')
        return WeightedLoss(self.own.tiled(tiles), self.weight)


class RoutedRunner(Runner):
    """Runs a span, and carries the sums; the output at the end is `(logits, auxiliary loss)`, or the model's own with
    both in it.

    Args:
        routing: of the model.
        args: of `Runner`.
    """

    def __init__(self, routing: RouterLoss, *args: Any) -> None:
        super().__init__(*args)
        self._routing = routing

    def __call__(self, message: Nest) -> Nest:
        sums: Sums | None = None
        if self._first:
            mask = self._mask(self._inputs.read(message)[0])
        else:
            hidden, travel, sums = self._apart(message)
            mask = self._mask(travel)
            message = self._inputs.pack(hidden, travel)
        with self._routing.heard(self.model) as heard:
            output = super().__call__(message)
        for logits in heard:
            sums = self._routing.add(sums, logits, mask)
        if not self._last:
            hidden, travel = self._inputs.unpack(output)
            return self._inputs.pack(hidden, _joined(travel, sums))
        assert sums is not None
        auxiliary = self._routing.loss(self._of_whole(sums))
        if isinstance(output, torch.Tensor):
            return output, auxiliary
        output.aux_loss = auxiliary
        output.loss = output.loss + self._routing.weight * auxiliary
        return output

    def carried(self, message: Nest, logits: list[torch.Tensor]) -> Nest:
        _, travel, sums = self._apart(message)
        for each in logits:
            sums = self._routing.add(sums, each, self._mask(travel))
        return _joined(travel, sums)

    def resumed(self, carried: Nest, run: Callable[[], Nest]) -> Nest:
        with self._routing.heard(self.model) as heard:
            hidden = first_tensor(run())
        return self.handed_on(hidden, self.carried(self.handed_on(hidden, carried), heard))

    def _mask(self, inputs: Mapping[str, Nest]) -> torch.Tensor | None:
        """Of the tokens that this rank has, `[batch, length]`."""
        mask = inputs.get("attention_mask")
        return mask if mask is None or self._shared is None else self._shared.of(mask)

    def _of_whole(self, sums: Sums) -> Sums:
        """The sums over whole sequences. Collective over the ranks that share them."""
        if self._shared is None:
            return sums
        return Sums(*self._shared.total(torch.cat(sums)).split([len(each) for each in sums]))

    def _apart(self, message: Nest) -> tuple[torch.Tensor, dict[str, Nest], Sums | None]:
        """The hidden state, the other inputs and the sums of a message."""
        hidden, travel = self._inputs.unpack(message)
        others = {name: value for name, value in travel.items() if name != SUMS}
        return hidden, others, Sums(*travel[SUMS]) if SUMS in travel else None


def _joined(travel: dict[str, Nest], sums: Sums | None) -> dict[str, Nest]:
    return travel if sums is None else travel | {SUMS: tuple(sums)}
