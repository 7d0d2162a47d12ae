"""Rungs of the memory ladder, as `examples/bench/ladder.py` measures them, on pooled ranks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "bench"))

import ladder


def measure(ranks, layers, micros, **which):
    cases = ladder.rungs(**which)
    ladder._pin = lambda rank, ranks: None
    return list(zip(cases, ladder.measure(0, ladder.Sizes(ranks, layers, micros, steps=0), cases), strict=True))
