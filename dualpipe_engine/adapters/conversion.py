"""Conversion: how the weights of a model come out of the entries of its files.

Published files of many models have other names than transformers' modules, and an entry for each expert where the
module has one stacked weight. transformers keeps tables of what becomes of what; here they are read for single weights,
so that a stage opens the entries of its own weights only.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

Read: TypeAlias = Callable[[str, range | None], torch.Tensor]
"""An entry of the files; of one `[experts, ...]` some experts alone, where a range is given."""


@dataclass
class Source:
    """The entries of which one or more weights are made.

    Args:
        target: the weight, or the first of them.
        converter: transformers' way of making them; None where the entry is the weight.
        entries: (name in the files, pattern of the converter that it fits).
    """

    target: str
    converter: Any
    entries: list[tuple[str, str | None]] = field(default_factory=list)

    def weights(self, model: nn.Module, read: Read) -> dict[str, torch.Tensor]:
        """Make the weights, by name.

        Args:
            model: the whole model, which may be on the meta device.
            read: an entry of the files.
        """
        if self.converter is None:
            return {self.target: read(self.entries[0][0], None)}
        return self._converted(self.entries, model, read)

    def share(self, model: nn.Module, read: Read, experts: range, total: int) -> dict[str, torch.Tensor]:
        """Make what some experts have of the weights `[total, ...]`, by name; no entry of others is read where the
        files have one for each expert, and nothing of others where they have the weight itself.

        Args:
            model: as for `weights`.
            read: likewise.
            experts: these.
            total: experts in all.
        """
        if self.converter is None:
            return {self.target: read(self.entries[0][0], experts)}
        numbers: Counter[str | None] = Counter()
        mine = []
        for entry in self.entries:  # those of a pattern are in the order of the experts
            if numbers[entry[1]] in experts:
                mine.append(entry)
            numbers[entry[1]] += 1
        if set(numbers.values()) == {total}:
            return self._converted(mine, model, read)
        whole = self.weights(model, read)
        return {name: value[experts.start : experts.stop].clone() for name, value in whole.items()}

    def _converted(
        self, entries: list[tuple[str, str | None]], model: nn.Module, read: Read
    ) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(self.converter)
        for name, pattern in entries:
            converter.add_tensor(self.target, name, pattern, read(name, None))
        found = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def sources_of(model: nn.Module, names: Iterable[str]) -> dict[str, Source]:
    """Weight of a transformers model -> what it is made of.

    Args:
        model: the whole model, which may be on the meta device.
        names: of all entries of the files; those that the model has no use for are left out.
    """
    from transformers import conversion_mapping, core_model_loading

    mapping = conversion_mapping.get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [each for each in mapping if isinstance(each, core_model_loading.WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, core_model_loading.WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, state = str(model.base_model_prefix), model.state_dict()
    found: dict[str, Source] = {}
    for name in sorted(names, key=core_model_loading.dot_natural_key):  # experts by number
        target, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, state)
        if target not in state:  # it has the name of the module already, but for the model's head
            target, pattern = core_model_loading.rename_source_key(name, [], [], prefix, state)
        if target not in state:
            continue
        if target not in found:
            found[target] = Source(target, by_pattern[pattern] if pattern else None)
            for other in found[target].converter.target_patterns[1:] if pattern else ():
                found[target.replace(found[target].converter.target_patterns[0], other)] = found[target]
        found[target].entries.append((name, pattern))
    return found
