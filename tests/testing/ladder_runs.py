"""Rungs of the memory ladder, as `examples/bench/ladder.py` measures them, on pooled ranks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "bench"))

import ladder


def measure(ranks, schedules, layers, micros, offloads):
    ladder.RANKS, ladder.LAYERS, ladder.MICROS, ladder.TIMED = ranks, layers, micros, 0
    cases = ladder.rungs(schedules, offloads)
    return list(zip(cases, ladder.measure(0, cases), strict=True))
