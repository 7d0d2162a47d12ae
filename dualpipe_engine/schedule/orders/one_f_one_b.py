"""1F1B (PipeDream-Flush): warm up, then one forward and one backward in turn."""

from __future__ import annotations

from ..op import B, F, Op
from ..placement import LINEAR, Placement
from ..plan import Plan


def generate(num_ranks: int, num_micro: int) -> Plan:
    """Rank r runs `num_ranks - r` forwards ahead of their backwards, the fewest that keep the last rank busy.

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
            ops.append(Op(B, stage, micro))
        programs.append(tuple(ops))
    return Plan(placement, num_micro, tuple(programs), "1f1b")
