""" "recompute": which modules of a rank it names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from deepspeed.pipe import PipelineModule
from torch import nn

from ...comm.from_all import from_all
from ...errors import ConfigError
from ...runtime.phases import Phased
from ..checks.agreement import raise_everywhere
from ..checks.token_mixing import SHARED_HEADS
from .module import numbered_layers

Wanted = bool | Sequence[str]


def recomputed_modules(module: PipelineModule, wanted: Wanted) -> dict[str, nn.Module]:
    """The modules of this rank that are computed again in the backward. Collective over all ranks.

    A name is a regular expression that is looked for in a module's name within its layer ("norm" finds "norm1" and
    "attention.norm"), or that is all of its class's name. What lies within a module that was found belongs to it.

    Args:
        module: a PipelineModule, placed or not.
        wanted: names; true: what each layer lists in its attribute `recomputed`; false: nothing.

    Returns:
        Number of the layer and name within it, such as "3.attention.norm" -> module.

    Raises:
        ConfigError: a name matches nothing on any rank, or a module that communicates.
    """
    if not wanted:
        return {}
    found: dict[str, nn.Module] = {}
    matched: set[str] = set()
    for number, layer in _layers(module):
        names = getattr(layer, "recomputed", ()) if wanted is True else wanted
        assert not isinstance(names, bool)
        taken: list[str] = []
        for name, part in layer.named_modules():
            hits = [each for each in names if re.search(each, name) or re.fullmatch(each, type(part).__name__)]
            matched.update(hits)
            if hits and not any(not outer or name.startswith(f"{outer}.") for outer in taken):
                taken.append(name)
                found[f"{number}.{name}" if name else f"{number}"] = part
    _check_names(module, () if wanted is True else wanted, matched, bool(found))
    raise_everywhere(
        [
            f'"recompute": {name} ({type(part).__name__}) has transfers that are not to be repeated: '
            "name modules in it that compute"
            for name, part in found.items()
            if any(isinstance(inner, Phased) or hasattr(inner, SHARED_HEADS) for inner in part.modules())
        ][:1]
    )
    return found


def _check_names(module: PipelineModule, names: Sequence[str], matched: set[str], any_found: bool) -> None:
    """Refuse names that no rank knows. Collective over all ranks."""
    parts = [named for _, layer in _layers(module) for named in layer.named_modules()]
    known = {text for name, part in parts for text in (name, type(part).__name__)}
    of_ranks = from_all((matched, known, any_found))
    all_matched = set().union(*(each for each, *_ in of_ranks))
    for name in names:
        if name not in all_matched:
            names_there = sorted(set().union(*(each for _, each, _ in of_ranks)) - {""})
            near = get_close_matches(name, names_there, n=3, cutoff=0.3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names_there[:20])}"
            raise ConfigError(
                f'"recompute": no module of any layer has a name with {name!r} in it: {hint}', everywhere=True
            )
    if not any(found for *_, found in of_ranks):
        raise ConfigError(
            '"recompute": true stands for what layers list in an attribute `recomputed`, and none does: give names of '
            "modules in their place",
            everywhere=True,
        )


def _layers(module: PipelineModule) -> Iterator[tuple[int, nn.Module]]:
    """Layers of this rank that are modules, each once, with their numbers."""
    seen: set[nn.Module] = set()
    for number, layer in numbered_layers(module):
        if isinstance(layer, nn.Module) and layer not in seen:
            seen.add(layer)
            yield number, layer
