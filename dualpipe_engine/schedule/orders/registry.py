"""The schedules by name: the one list that every other part asks."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

from ...errors import PlanError
from ..placement import BIDIRECTIONAL, LINEAR, VEE, Placement, directions_of, parts_of
from ..plan import Plan
from . import dualpipe, dualpipev, one_f_one_b, vhalf, vmin, zb1p, zbv


class Schedule(NamedTuple):
    """What is known of a schedule.

    Args:
        placement: the name of its placement.
        generate: from ranks and micro-batches to the reference order.
        splits: whether backwards are split into I and W.
        default_cap: activations that the reference order holds on PP ranks, with any number of micro-batches.
        any_cap: whether there is a plan for every cap from `search.under_cap.LEAST_CAP` activations.
        by_cap: whether it is known for its cap: its plans hold no more, and are those of `search.under_cap`.
    """

    placement: str
    generate: Callable[[int, int], Plan]
    splits: bool
    default_cap: Callable[[int], int]
    any_cap: bool = False
    by_cap: bool = False

    @property
    def parts(self) -> int:
        """Stages that one of a linear cut is divided into."""
        return parts_of(self.placement)

    @property
    def copies(self) -> int:
        """Copies of each stage's parameters."""
        return directions_of(self.placement)


KNOWN = {
    "1f1b": Schedule(LINEAR, one_f_one_b.generate, False, lambda pp: pp),
    "zb1p": Schedule(LINEAR, zb1p.generate, True, lambda pp: pp),
    "dualpipe": Schedule(BIDIRECTIONAL, dualpipe.generate, True, lambda pp: pp + 1),
    "dualpipev": Schedule(VEE, dualpipev.generate, True, lambda pp: 2 * pp + 1),
    "zbv": Schedule(VEE, zbv.generate, True, lambda pp: 2 * pp, any_cap=True),
    "vhalf": Schedule(VEE, vhalf.generate, True, vhalf.cap, any_cap=True, by_cap=True),
    "vmin": Schedule(VEE, vmin.generate, True, vmin.cap, any_cap=True, by_cap=True),
}
SCHEDULES = tuple(KNOWN)  #: those of the package


def register_schedule(name: str, schedule: Schedule) -> None:
    """Let a name stand for a schedule: in the configuration, for `auto`, and wherever a plan is made by name."""
    KNOWN[name] = schedule


def placement_of(schedule: str, num_ranks: int) -> Placement:
    """The placement that a schedule runs on.

    Raises:
        PlanError: the name is unknown, or the rank count does not fit.
    """
    return Placement(known_schedule(schedule).placement, num_ranks)


def known_schedule(schedule: str) -> Schedule:
    """The schedule of a name.

    Raises:
        PlanError: the name is unknown.
    """
    if schedule not in KNOWN:
        near = get_close_matches(schedule, KNOWN, n=1, cutoff=0.0)[0]
        raise PlanError(f"unknown schedule {schedule!r}: did you mean {near!r}? There are {', '.join(KNOWN)}")
    return KNOWN[schedule]
