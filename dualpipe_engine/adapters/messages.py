"""Messages between stages: the hidden state, and the inputs of the model that every stage needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..comm.nest import Nest
from ..errors import ConfigError

SHAPE = "shape:"  #: prefix of an input that travels as its shape only

ANSWERS = ("start_positions", "end_positions")
"""Names of labels that are not called so."""


class Inputs:
    """Reads what the data loader gives and what stages pass on.

    Args:
        names: of the model's inputs, in the order in which a tuple lists them; the first is the main input.
        embeds: give stages after the first their hidden state as `inputs_embeds`, in place of the token ids.
        fixed: keyword arguments of every call.
    """

    def __init__(self, names: tuple[str, ...], embeds: bool, fixed: Mapping[str, Nest]) -> None:
        self.names, self.embeds, self._fixed = names, embeds, dict(fixed)
        self._seen: frozenset[str] | None = None

    def only(self, names: Iterable[str]) -> None:
        """Refuse batches with other tensors than those named, and labels, from now on."""
        self._seen = frozenset(names)

    def with_ids(self) -> Inputs:
        """The same for stages that all get the token ids."""
        return Inputs(self.names, False, self._fixed)

    def read(self, batch: Nest) -> tuple[dict[str, Nest], dict[str, Nest]]:
        """The keyword arguments of the model's forward, and those that travel on."""
        if isinstance(batch, Mapping):
            given = dict(batch)
        else:
            values = batch if isinstance(batch, (tuple, list)) else (batch,)
            given = dict(zip(self.names, values, strict=False))
        given = {name: value for name, value in given.items() if value is not None}
        self._refuse_unseen(given)
        travel = {}
        for name, value in given.items():
            if name in (self.names[0], "inputs_embeds") and isinstance(value, torch.Tensor):
                if value.is_floating_point():
                    travel[SHAPE + name] = tuple(value.shape)
                    continue
                if self.embeds:
                    continue
            travel[name] = value
        return self._fixed | given, travel

    def _refuse_unseen(self, given: Mapping[str, Nest]) -> None:
        for name, value in given.items():
            known = self._seen is None or name in self._seen or "label" in name or name in ANSWERS
            if not known and isinstance(value, torch.Tensor):
                raise ConfigError(
                    f"the stages were not tried with {name}, so what it changes may pass around the blocks: give "
                    "get_model_adapter example_inputs= with all that a batch has"
                )

    def stand_in(self, hidden: torch.Tensor, travel: Mapping[str, Nest]) -> dict[str, Nest]:
        """The keyword arguments of a later stage's forward."""
        kwargs = dict(self._fixed)
        for name, value in travel.items():
            if name.startswith(SHAPE):
                kwargs[name.removeprefix(SHAPE)] = hidden.new_zeros(()).expand(value)
            else:
                kwargs[name] = value
        if self.names[0] not in kwargs and "inputs_embeds" not in kwargs:
            kwargs["inputs_embeds"] = hidden.detach()
        return kwargs

    @staticmethod
    def pack(hidden: torch.Tensor, travel: dict[str, Nest]) -> Nest:
        return (hidden, travel) if travel else hidden

    @staticmethod
    def unpack(message: Nest) -> tuple[torch.Tensor, dict[str, Nest]]:
        return (message, {}) if isinstance(message, torch.Tensor) else message

    @staticmethod
    def result(output: Nest, travel: Mapping[str, Nest]) -> Nest:
        """The model's whole output where labels came with the batch, else its logits or hidden state."""
        if "labels" in travel or isinstance(output, torch.Tensor):
            return output
        for name in ("logits", "prediction_logits", "last_hidden_state"):
            if getattr(output, name, None) is not None:
                return getattr(output, name)
        return output[0]
