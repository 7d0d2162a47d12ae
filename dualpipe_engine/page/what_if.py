"""What if: the measured costs under every schedule, and under every activation cap that a dial knows."""

from __future__ import annotations

from collections.abc import Sequence

from ..profiling.profile import Profile
from ..schedule.orders.registry import KNOWN
from ..schedule.search.compare import Row, compare

OPS = 200_000  #: schedules of more ops are taken in their reference order, since searching takes seconds each
CAPS = 6  #: caps between the least and the largest that are tried


def what_if(profile: Profile) -> list[Row]:
    """Rows of `compare` for the costs of the profile: each schedule at its own cap, then what takes any cap at some
    below. Rows without a plan are kept: they say why.

    Makespans are simulated with transfers for as long as they took.
    """
    plan, ranks = profile.plan, profile.plan.placement.num_ranks
    costs = profile.costs.joined(plan.placement.parts)
    split = profile.facts.get("weight_split") != 0
    optimize = plan.num_ops <= OPS
    rows = compare(ranks, plan.num_micro, costs, optimize=optimize, split_backward=split)
    dials = [name for name, known in KNOWN.items() if known.any_cap and not known.by_cap]
    for cap in _caps(rows):
        for row in compare(ranks, plan.num_micro, costs, cap, optimize, split, schedules=dials):
            if row.feasible and not any(_same(row, other) for other in rows):
                rows.append(row)
    return rows


def _caps(rows: Sequence[Row]) -> list[float]:
    """Caps in activations of a full stage, evenly from the least peak of any schedule to the largest."""
    peaks = [row.peak_activations for row in rows if row.feasible]
    if not peaks:
        return []
    least, most = min(peaks), max(peaks)
    return sorted({round(2 * (least + (most - least) * part / CAPS)) / 2 for part in range(CAPS)})


def _same(one: Row, other: Row) -> bool:
    """Whether a cap changed nothing."""
    return (one.schedule, one.makespan, one.peak_activations) == (
        other.schedule,
        other.makespan,
        other.peak_activations,
    )
