"""Rows of a grid in which every pair of values of two factors stands at least once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import Any

Row = dict[str, Any]


def pairwise(factors: dict[str, list[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """A small set of allowed rows with every pair of values that an allowed row has; the same one each time.

    Greedy: of 100 rows that hold a pair that is left, the one with the most of them.
    """
    whole = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    whole = [row for row in whole if allowed(row)]
    holders: dict[Any, list[Row]] = {}
    for row in whole:
        for pair in pairs_of(row):
            holders.setdefault(pair, []).append(row)
    left, rows, chance = dict.fromkeys(holders), [], random.Random(0)
    while left:
        some = holders[next(iter(left))]
        rows.append(
            max(chance.sample(some, min(100, len(some))), key=lambda row: sum(p in left for p in pairs_of(row)))
        )
        for pair in pairs_of(rows[-1]):
            left.pop(pair, None)
    return rows


def pairs_of(row: Row) -> Iterator[tuple[Any, ...]]:
    return combinations(row.items(), 2)
