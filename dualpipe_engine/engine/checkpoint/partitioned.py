"""The states of whole parameters, out of the files in which the ranks of ZeRO keep their fragments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from ..given import ParamGroup, SavedState
from ..placing.param_groups import PLACEHOLDER
from .files import peek

FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_OF_RANKS = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups")

States: TypeAlias = dict[str, SavedState]
"""Of a parameter, or of a part of it: "fp32" and what the optimizer keeps, by name."""

Numbers: TypeAlias = Mapping[tuple[int, int], Mapping[str, int]]
"""(position, copy) -> name of a parameter of experts -> number of the rank among those that share it."""

NameOf: TypeAlias = Callable[[str, int], str | None]
"""Of (name of a parameter, position that holds it): its name in the whole model; None where it is not trained."""


class _Part(NamedTuple):
    """A fragment of a parameter.

    Args:
        position: pipe position of the rank that has it.
        share: number of the rank among those that share an expert.
        copy: number of the rank among all copies of the stage.
        states: flat.
    """

    position: int
    share: int
    copy: int
    states: States


def partitioned_states(
    files: Sequence[Path],
    shapes: Mapping[str, torch.Size],
    sizes: Mapping[str, int],
    numbers: Numbers,
    name_of: NameOf,
) -> Iterator[tuple[str, States]]:
    """Name and states of each parameter that is no placeholder.

    Args:
        files: of ZeRO, of all ranks.
        shapes: of what a rank holds.
        sizes: ranks that share a parameter of experts.
        numbers: of these ranks.
        name_of: as `NameOf`.
    """
    parts: dict[str, list[_Part]] = {}
    for path in files:
        copy, position = map(int, FILE.search(path.name).groups())  # type: ignore[union-attr]
        for here, states in _fragments(peek(path)["optimizer_state_dict"]):
            name = name_of(here, position)
            if name is None:
                continue
            share = numbers[position, copy].get(here, 0)
            parts.setdefault(name, []).append(_Part(position, share, copy, states))
    for name, found in parts.items():
        if not name.startswith(PLACEHOLDER):
            yield name, _joined(found, sizes.get(name, 1), shapes[name])


def of_all_ranks(file: Path) -> tuple[list[ParamGroup], SavedState]:
    """The groups of parameters of a rank, and what ZeRO keeps beside the states, the same on all ranks."""
    saved = peek(file)["optimizer_state_dict"]
    kept = {key: value for key, value in saved.items() if key not in _OF_RANKS}
    return saved["base_optimizer_state"]["param_groups"], kept


def _fragments(optimizer: SavedState) -> Iterator[tuple[str, States]]:
    """Name and states of all that a rank has of its parameters."""
    states = optimizer["base_optimizer_state"]["state"]
    for number, mapping in enumerate(optimizer["param_slice_mappings"]):
        flat = optimizer["single_partition_of_fp32_groups"][number]
        held = {"fp32": flat} | states.get(number, {})
        for name, at in mapping.items():
            yield (
                name,
                {
                    key: value.narrow(0, at.start, at.numel)
                    if torch.is_tensor(value) and value.dim() == 1 and len(value) >= len(flat)  # padded, or not
                    else value
                    for key, value in held.items()
                },
            )


def _joined(parts: list[_Part], size: int, shape: torch.Size) -> States:
    """The states of a whole parameter.

    Args:
        parts: of it.
        size: ranks that share it; 1: each copy holds it whole.
        shape: of what a rank holds.
    """
    position = min(part.position for part in parts)  # a tied one is at several
    shares: list[list[States]] = [[] for _ in range(size)]
    for part in sorted(parts, key=lambda part: part.copy):
        if part.position == position:
            shares[part.share].append(part.states)
    found: States = {}
    for key, value in shares[0][0].items():
        if key == "step" or not torch.is_tensor(value) or not value.dim():
            found[key] = value
        else:
            flat = [torch.cat([states[key] for states in share]) for share in shares]
            found[key] = torch.cat([each.view(shape) for each in flat])
    return found
