"""Make a plan by name."""

from __future__ import annotations

from difflib import get_close_matches

from ..errors import PlanError
from . import dualpipe, dualpipev, one_f_one_b, zb1p, zbv
from .costs import CostModel
from .plan import Plan

_GENERATORS = {
    "1f1b": one_f_one_b.generate,
    "zb1p": zb1p.generate,
    "dualpipe": dualpipe.generate,
    "dualpipev": dualpipev.generate,
    "zbv": zbv.generate,
}
SCHEDULES = tuple(_GENERATORS)


def make_plan(schedule: str, num_ranks: int, num_micro: int, costs: CostModel | None = None) -> Plan:
    """Make the compute plan of a schedule, in its reference order.

    Raises:
        PlanError: the name is unknown, or the rank count does not fit the schedule.
    """
    if schedule not in _GENERATORS:
        near = get_close_matches(schedule, SCHEDULES, n=1, cutoff=0)
        raise PlanError(f"unknown schedule {schedule!r}: did you mean {near[0]!r}? There are {', '.join(SCHEDULES)}")
    return _GENERATORS[schedule](num_ranks, num_micro)
