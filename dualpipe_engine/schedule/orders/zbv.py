"""ZB-V: zero bubble on a V of two stages a rank, with the activation memory of 1F1B (arXiv 2405.15362, section 3)."""

from __future__ import annotations

from ..op import F, I, Op, W
from ..passes.wfill import wfill
from ..placement import VEE, Placement
from ..plan import Plan
from ..timing.costs import UNIT
from .emitter import Emitter


def generate(num_ranks: int, num_micro: int) -> Plan:
    """Zero-bubble order for f = i = w; rank r runs stages r and `2 * num_ranks - 1 - r`.

    Args:
        num_ranks: pipeline ranks, any number.
        num_micro: micro-batches of the batch.

    Raises:
        PlanError: a count is below 1.
    """
    placement = Placement(VEE, num_ranks)
    programs = (_program(placement, rank, num_micro) for rank in range(num_ranks))
    plan = Plan(placement, num_micro, tuple(programs), "zbv")
    if num_micro < 2 * num_ranks - 1:  # the warm-up is cut short, and its W no longer sit in idle time
        return wfill(plan, UNIT, cap=2 * num_ranks)
    return plan


def _program(placement: Placement, rank: int, num_micro: int) -> tuple[Op, ...]:
    num_ranks = placement.num_ranks
    emitter = Emitter(placement.stages_of(rank), (range(num_micro), range(num_micro)))
    n = max(num_micro, 2 * num_ranks - 1)  # the steps need that many; those of missing micro-batches emit nothing
    # Warm-up: fill the V, then start its second leg as soon as the first micro-batch turns round.
    emitter.repeat(2 * (num_ranks - rank) - 1, (F, 0))
    emitter.repeat(rank, (F, 1), (F, 0))
    emitter.repeat(num_ranks - rank, (F, 1), (I, 1), (W, 1))
    # Steady state: forward and backward on both stages in turn; the last rounds have no new micro-batch.
    emitter.repeat(n - num_ranks, (F, 0), (I, 0), (W, 0), (F, 1), (I, 1), (W, 1))
    # Cool-down: input gradients first, for they are what the other ranks wait for.
    emitter.repeat(rank, (I, 0), (I, 1))
    emitter.repeat(num_ranks - rank, (I, 0), (W, 0))
    emitter.repeat(2 * rank, (W, 0))
    return tuple(emitter.ops)
