"""ZB1P: 1F1B whose weight gradients wait for idle time (zero bubble, arXiv 2401.10241, section 2, schedule ZB-H1)."""

from __future__ import annotations

from ..op import F, I, Op, W
from ..placement import LINEAR, Placement
from ..plan import Plan


def generate(num_ranks: int, num_micro: int) -> Plan:
    """1F1B where rank r runs the W of a micro-batch r backwards later than its I.

    Rank r holds `num_ranks - r` micro-batches that wait for their backward and r that wait for their W, so every rank
    holds as much as the first one does in 1F1B.

    Args:
        num_ranks: pipeline ranks, any number.
        num_micro: micro-batches of the batch.

    Raises:
        PlanError: a count is below 1.
    """
    placement = Placement(LINEAR, num_ranks)
    programs = []
    for stage in range(num_ranks):
        ahead = min(num_ranks - 1 - stage, num_micro)
        ops = [Op(F, stage, micro) for micro in range(ahead)]
        for micro in range(num_micro):
            if micro + ahead < num_micro:
                ops.append(Op(F, stage, micro + ahead))
            ops.append(Op(I, stage, micro))
            if micro >= stage:
                ops.append(Op(W, stage, micro - stage))
        ops += [Op(W, stage, micro) for micro in range(max(num_micro - stage, 0), num_micro)]
        programs.append(tuple(ops))
    return Plan(placement, num_micro, tuple(programs), "zb1p")
