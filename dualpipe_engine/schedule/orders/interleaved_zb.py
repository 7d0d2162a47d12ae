"""Interleaved zero bubble: interleaved 1F1B whose weight gradients wait for idle time (arXiv 2401.10241)."""

from __future__ import annotations

from dataclasses import replace

from ..passes.wfill import wfill
from ..plan import Plan
from ..timing.costs import UNIT
from . import interleaved


def generate(num_ranks: int, num_micro: int, stages_per_rank: int = interleaved.STAGES) -> Plan:
    """The order of interleaved 1F1B with its backwards split, and each W where its rank would wait for f = i = w.

    No rank holds more than the first one does in interleaved 1F1B. The idle time of a last round that is not full is
    filled too.

    Args, Raises: see `interleaved.generate`.
    """
    order = interleaved.generate(num_ranks, num_micro, stages_per_rank)
    return replace(wfill(order, UNIT, interleaved.cap(num_ranks, stages_per_rank)), schedule="interleaved_zb")
