"""V-Min: a third of the activations of 1F1B on a V of two stages a rank (arXiv 2405.15362, section 3)."""

from __future__ import annotations

from ..plan import Plan
from .fastest_block import under


def cap(num_ranks: int) -> int:
    """Activations that a rank holds at most."""
    return min((2 * num_ranks + 8) // 3, 2 * num_ranks)


def generate(num_ranks: int, num_micro: int) -> Plan:
    """A building block within 2/3 (PP + 4) activations of half a stage, squeezed for f = i = w.

    Args:
        num_ranks: pipeline ranks, any number; rank r runs stages r and `2 * num_ranks - 1 - r`.
        num_micro: micro-batches of the batch.

    Raises:
        PlanError: a count is below 1.
    """
    return under(num_ranks, num_micro, cap(num_ranks), "vmin")
