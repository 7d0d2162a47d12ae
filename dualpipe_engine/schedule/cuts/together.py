"""Layers that stay in one stage with the layer behind them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..placement import Placement


def kept_together(bounds: Sequence[int], with_next: Sequence[bool], placement: Placement) -> list[int]:
    """Where first and last stage share a rank, a cut that leaves such layers together, so that what they share with the
    first layer is there.

    Args:
        bounds: the cut; it stays where there are too few layers for another.
        with_next: of each layer, whether it stays with the next.
        placement: of its stages.
    """
    if placement.num_stages - 1 not in placement.stages_of(placement.rank(0)):
        return list(bounds)
    found = list(bounds)
    for index in reversed(range(1, len(found) - 1)):
        found[index] = min(found[index], found[index + 1] - 1)
        while found[index] > 0 and with_next[found[index] - 1]:
            found[index] -= 1
    return found if all(start < stop for start, stop in pairwise(found)) else list(bounds)
