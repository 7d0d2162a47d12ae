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
from ..placing.module import PlacedModule

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


def names_of_layers(module: PlacedModule) -> dict[str, str]:
    """Of what tied layers have of their own, where the rank holds no first layer of the tie: name on this rank -> name
    on one that does.

    Args:
        module: of the rank.
    """
    found: dict[str, str] = {}
    for key, part in module.tied_modules.items():
        layers = [
            n for n, each in enumerate(module._layer_specs) if isinstance(each, TiedLayerSpec) and each.key == key
        ]
        held = min(set(layers).intersection(module.dualpipe_layers))
        if held != layers[0]:
            tied = [module._recursive_getattr(part, name) for name in module.tied_weight_attrs[key]]
            own = [name for name, param in part.named_parameters() if not any(param is each for each in tied)]
            found |= {f"tied_modules.{key}.{name}": f"{held}.{name}" for name in own}
    return found


def without_own(module: PipelineModule, layout: Layout) -> Layout:
    """`layout` without the parameters that tied layers have of their own."""
    return [[each for each in group if each[0] is None or name_in_tie(module, each[0]) is None] for group in layout]


@contextmanager
def named_as_saved(module: PlacedModule, names: dict[nn.Parameter, str], folder: Path) -> Iterator[None]:
    """In the body, parameters have the names by which a universal checkpoint holds them.

    Args:
        module: the model.
        names: of its parameters, by which DeepSpeed finds their states.
        folder: of the checkpoint.
    """
    before, of_layers = dict(names), names_of_layers(module)
    for param, name in before.items():
        other, own = name_in_tie(module, name), of_layers.get(name)
        if own is not None and (folder / "zero" / own).is_dir():
            names[param] = own
        elif other is not None and not (folder / "zero" / name).is_dir() and (folder / "zero" / other).is_dir():
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
