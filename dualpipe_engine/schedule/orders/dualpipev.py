"""DualPipeV: DualPipe cut in half, one copy of the parameters (the cut-in-half note; DeepSeek's DualPipeV)."""

from __future__ import annotations

from ..placement import VEE, Placement
from ..plan import Plan
from .eight_steps import eight_steps


def generate(num_ranks: int, num_micro: int) -> Plan:
    """The order of DeepSeek's implementation for `num_micro >= 2 * num_ranks`, pruned below that.

    Args:
        num_ranks: pipeline ranks, any number; rank r runs stages r and `2 * num_ranks - 1 - r`.
        num_micro: micro-batches of the batch.

    Raises:
        PlanError: a count is below 1.
    """
    placement = Placement(VEE, num_ranks)
    micros = (range(num_micro), range(num_micro))
    programs = (eight_steps(num_ranks, rank, placement.stages_of(rank), micros) for rank in range(num_ranks))
    return Plan(placement, num_micro, tuple(programs), "dualpipev")
