"""A plan that shows what pairs of a forward and a backward cost."""

from __future__ import annotations

from ..op import B, F, Op, pair
from ..placement import LINEAR, Placement
from ..plan import Plan


def paired_plan(num_ranks: int, num_micro: int) -> Plan:
    """1F1B with one more micro-batch in flight, so that each forward can run as a pair with a backward.

    Nobody trains with it: it shows what a pair costs on the stages of the linear placement.

    Raises:
        PlanError: a count is below 1.
    """
    placement = Placement(LINEAR, num_ranks)
    programs = []
    for stage in range(num_ranks):
        ahead = min(num_ranks - stage, num_micro)
        ops = [Op(F, stage, micro) for micro in range(ahead)]
        for micro in range(num_micro):
            backward = Op(B, stage, micro)
            ops.append(pair(Op(F, stage, micro + ahead), backward) if micro + ahead < num_micro else backward)
        programs.append(tuple(ops))
    return Plan(placement, num_micro, tuple(programs), "paired")
