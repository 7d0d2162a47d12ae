"""Moves: in which order layers go from rank to rank, so that no rank ever holds more than it has room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...schedule.placement import Placement
from .partition import stage_of_layer


class Move(NamedTuple):
    """One layer goes from one rank of a pipeline to another.

    Args:
        leaves: whether its source does not hold it any more from then on; known of moves in their order.
    """

    layer: int
    source: int
    target: int
    leaves: bool = False


def moves_between(placement: Placement, before: Sequence[int], after: Sequence[int]) -> list[Move]:
    """The moves that bring each layer to all ranks that shall hold it.

    Args:
        placement: of the stages `after`.
        before: bounds of the stages that the ranks were built with, one a rank.
        after: bounds of the stages to be placed.
    """
    found = []
    for layer in range(after[-1]):
        source = stage_of_layer(before, layer)
        targets = placement.replicas(stage_of_layer(after, layer))
        found += [Move(layer, source, target) for target in targets if target != source]
    return found


def leaving(placement: Placement, before: Sequence[int], after: Sequence[int]) -> set[int]:
    """The layers that the rank which built them does not keep."""
    return {
        layer
        for layer in range(after[-1])
        if stage_of_layer(before, layer) not in placement.replicas(stage_of_layer(after, layer))
    }


def ordered(moves: Sequence[Move], sizes: Mapping[int, int], leaves: set[int]) -> list[Move]:
    """The moves in an order, the same on all ranks, in which a rank holds at no time more than the larger of what it
    built and what it shall hold, and one layer.

    A layer goes only to a rank that holds no more than it shall in the end. There always is one: what all ranks hold
    beyond that is no more than what has still to leave them, and all that leaves has still to arrive somewhere. Among
    those moves the one is taken whose two ranks are free first, so that ranks work beside each other.

    Args:
        moves: of one pipeline.
        sizes: layer -> bytes.
        leaves: layers that their source drops after their last move.
    """
    waiting: dict[tuple[int, int], list[Move]] = {}
    uses = Counter(move.layer for move in moves)
    above: Counter[int] = Counter()  # rank -> bytes that it holds beyond what it shall
    for move in sorted(moves, reverse=True):
        waiting.setdefault((move.source, move.target), []).append(move)
        above[move.target] -= sizes[move.layer]
    for layer, source in {move.layer: move.source for move in moves}.items():
        above[source] += sizes[layer] if layer in leaves else 0
    free: Counter[int] = Counter()  # rank -> bytes that have gone through it
    order = []
    for _ in moves:
        pairs = [pair for pair in waiting if waiting[pair] and above[pair[1]] <= 0]
        source, target = min(pairs, key=lambda pair: (max(free[pair[0]], free[pair[1]]), pair))
        move = waiting[source, target].pop()
        size = sizes[move.layer]
        uses[move.layer] -= 1
        above[target] += size
        last = move.layer in leaves and not uses[move.layer]
        above[source] -= size if last else 0
        free[source] = free[target] = max(free[source], free[target]) + size
        order.append(move._replace(leaves=last))
    return order
