"""DualPipe: both ends of the pipeline feed micro-batches (DeepSeek-V3 report, arXiv 2412.19437, section 3.2.1)."""

from __future__ import annotations

from ..placement import BIDIRECTIONAL, Placement
from ..plan import Plan
from .eight_steps import eight_steps


def generate(num_ranks: int, num_micro: int) -> Plan:
    """The order of DeepSeek's implementation for even `num_micro >= 2 * num_ranks`, pruned for other counts.

    Args:
        num_ranks: even number of pipeline ranks.
        num_micro: micro-batches of the batch; direction d runs those with `micro % 2 == d`.

    Raises:
        PlanError: the rank count is odd, or a count is below 1.
    """
    placement = Placement(BIDIRECTIONAL, num_ranks)
    half = num_ranks // 2
    programs = []
    for rank in range(num_ranks):
        directions = (0, 1) if rank < half else (1, 0)
        stages = [placement.stages_of(rank)[direction] for direction in directions]
        micros = [placement.micros(direction, num_micro) for direction in directions]
        programs.append(eight_steps(half, min(rank, num_ranks - 1 - rank), stages, micros))
    return Plan(placement, num_micro, tuple(programs), "dualpipe")
