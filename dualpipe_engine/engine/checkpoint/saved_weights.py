"""Weights in the files of layers, found by the names that parameters have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...models.autoep.weights import SourceForm
from ..placing.own_files import LOSS, file_of_layer
from .description import LayerFile
from .files import peek


class SavedWeights:
    """Weights of all layers of a checkpoint; those of experts are of all ranks that share them.

    Args:
        folder: of the checkpoint.
        layers: as its description has them.
        forms: how the files have blocks of experts, by the name of the block.
    """

    def __init__(self, folder: Path, layers: Sequence[LayerFile], forms: Mapping[str, SourceForm]) -> None:
        self._folder, self._layers, self._forms = folder, layers, forms
        self._last: tuple[int, dict[str, Tensor]] = -1, {}

    def get(self, name: str) -> Tensor | None:
        """The weight that a parameter of that name has; None where no file has one."""
        first, _, rest = name.partition(".")
        tied = None
        if first == "tied_modules":
            tied, _, rest = rest.partition(".")
        for number, layer in enumerate(self._layers):
            if layer["file"] and (layer["tied"] == tied if tied is not None else str(number) == first):
                found = self._layer(number).get(rest)
                if found is not None:
                    return found
        own = self._folder / (LOSS if first == "loss_fn" else file_of_layer(int(first)) if first.isdigit() else "")
        return peek(own, weights_only=True).get(rest) if own.is_file() else None

    def _layer(self, number: int) -> dict[str, Tensor]:
        if number != self._last[0]:
            weights = dict(peek(self._folder / f"layer_{number:02d}-model_states.pt", weights_only=True))
            for path, form in self._forms.items():
                layer, _, block = path.partition(".")
                if layer == str(number):
                    form.from_source(weights, f"{block}.")
            self._last = number, weights
        return self._last[1]
