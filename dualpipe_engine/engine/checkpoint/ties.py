"""What tied layers have beside the tied weights, where a checkpoint has nothing of it.

    tied_modules.embed.table.weight    tied, of all layers of the tie
    tied_modules.embed.place.weight    the first layer's own; another's, on a rank that holds no other of the tie
    10.place.weight                    the last layer's own, on a rank that holds the first one, too

A checkpoint has no such name as the last if its ranks held one layer of the tie each, or let all of them share what the
first one has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TypeAlias

import torch
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import nn

from ..given import SavedState

Layout: TypeAlias = list[list[tuple[str | None, torch.Size]]]
"""Name and shape of each parameter that an optimizer steps, by group."""


def name_in_tie(module: PipelineModule, name: str) -> str | None:
    """Of a parameter that a tied layer has of its own: its name on a rank that holds no other layer of the tie.

    Args:
        module: the model.
        name: of any parameter in it; None is returned for those of other layers.
    """
    number, _, rest = name.partition(".")
    spec = module._layer_specs[int(number)] if number.isdigit() else None
    return f"tied_modules.{spec.key}.{rest}" if isinstance(spec, TiedLayerSpec) else None


def without_own(module: PipelineModule, layout: Layout) -> Layout:
    """`layout` without the parameters that tied layers have of their own."""
    return [[each for each in group if each[0] is None or name_in_tie(module, each[0]) is None] for group in layout]


@contextmanager
def named_as_saved(module: PipelineModule, names: dict[nn.Parameter, str], folder: Path) -> Iterator[None]:
    """In the body, parameters that a universal checkpoint does not hold have the names by which it does.

    Args:
        module: the model.
        names: of its parameters, by which DeepSpeed finds their states.
        folder: of the checkpoint.
    """
    before = dict(names)
    for param, name in before.items():
        other = name_in_tie(module, name)
        if other is not None and not (folder / "zero" / name).is_dir() and (folder / "zero" / other).is_dir():
            names[param] = other
    try:
        yield
    finally:
        names.update(before)


def with_own(module: PipelineModule, state: SavedState, layout: Layout) -> SavedState:
    """The state of an optimizer that was saved for `without_own(module, layout)`, for `layout`: what it lacks has
    none yet.

    Args:
        module: the model.
        state: `state_dict` of an optimizer of torch.
        layout: of the optimizer that shall load it.
    """
    numbers, groups, moved = count(), [], {}
    for saved, group in zip(state["param_groups"], layout, strict=True):
        old = iter(saved["params"])
        params = [next(numbers) for _ in group]
        for (name, _), new in zip(group, params, strict=True):
            if name is None or name_in_tie(module, name) is None:
                moved[next(old)] = new
        groups.append({**saved, "params": params})
    return {**state, "param_groups": groups, "state": {moved[old]: each for old, each in state["state"].items()}}
