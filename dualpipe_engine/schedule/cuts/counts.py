"""Cuts that are given: the number of layers of each stage, as text such as "6,6,5,5"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from ...errors import ConfigError
from ..placement import Placement

_NUMBERS = re.compile(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*")


def parse_counts(text: str | None) -> tuple[int, ...] | None:
    """The counts; None if the text is something else."""
    if text is None or not _NUMBERS.fullmatch(text):
        return None
    return tuple(int(part) for part in text.split(","))


def counts_text(bounds: Sequence[int]) -> str:
    """The counts of a cut as text, from which `parse_counts` and `bounds_of_counts` make its bounds again."""
    return ",".join(str(stop - start) for start, stop in pairwise(bounds))


def bounds_of_counts(counts: Sequence[int], num_layers: int, placement: Placement) -> tuple[int, ...]:
    """Bounds of the stages: stage s has layers bounds[s] to bounds[s+1] - 1.

    Raises:
        ConfigError: the counts are for other layers or stages, or leave a stage empty.
    """
    given = ",".join(map(str, counts))
    if len(counts) != placement.num_stages:
        share = "one a rank"
        if placement.num_stages != placement.num_ranks:
            share = f"{placement.num_stages // placement.num_ranks} a rank"
        raise ConfigError(
            f"the cut {given} is for {len(counts)} stages, but the schedule has {placement.num_stages}, {share}: give "
            f"{placement.num_stages} numbers of layers, first stage first"
        )
    if sum(counts) != num_layers:
        raise ConfigError(
            f"the cut {given} is for {sum(counts)} layers, but the model has {num_layers}, embedding and head "
            f"included: let the numbers add up to {num_layers}"
        )
    if not all(counts):
        raise ConfigError(f"the cut {given} leaves stage {list(counts).index(0)} without layers: give each at least 1")
    return (0, *accumulate(counts))
