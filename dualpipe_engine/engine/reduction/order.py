"""The order in which the copies of a stage reduce what each of their weight-gradient ops adds, found from the plan."""

from __future__ import annotations

from ...schedule.op import GRADIENTS, atoms
from ...schedule.plan import Plan


def contributions(plan: Plan, rank: int) -> list[int]:
    """The stages to whose weight gradients `rank` adds, one entry for each B and W, in program order."""
    return [part.stage for op in plan.programs[rank] for part in atoms(op) if part.kind in GRADIENTS]


def reduction_order(plan: Plan, rank: int) -> list[tuple[int, int]]:
    """The reductions (stage, k), k = 0, 1, ..., in the order that `rank` and its twin both follow.

    Reduction (s, k) adds up what the k-th B or W of stage s has left on each copy. Collectives of one group must be
    issued in one order, but twins need not run their weight gradients in one order: a plan's fill with W may differ
    between them, and with an odd number of micro-batches one twin has fewer. So both follow the order of the later
    twin's op, counted in weight-gradient ops, and for equal counts the order of stages. A rank that is ahead keeps the
    gradient until its turn; one that has no k-th op takes part with zeros.

    Twins with stages 0 and 3; `0.1` is the second reduction of stage 0:

        weight gradients   1st   2nd   3rd   4th
        rank 0             0.0   3.0   3.1   0.1
        rank 3             3.0   0.0   0.1   3.1
        due (the later)    0.0 and 3.0 at the 2nd, 0.1 and 3.1 at the 4th
        both issue               0.0, 3.0    0.1, 3.1
    """
    twins = plan.placement.replicas(plan.placement.stages_of(rank)[0])
    due: dict[tuple[int, int], int] = {}
    for twin in twins:
        counts: dict[int, int] = {}
        for position, stage in enumerate(contributions(plan, twin)):
            event = (stage, counts.get(stage, 0))
            counts[stage] = event[1] + 1
            due[event] = max(due.get(event, 0), position)
    latest: dict[int, int] = {}
    for stage, k in sorted(due):
        due[stage, k] = latest[stage] = max(due[stage, k], latest.get(stage, 0))
    return sorted(due, key=lambda event: (due[event], *event))
