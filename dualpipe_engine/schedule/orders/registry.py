"""The schedules by name: the one list that every other part asks."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

from ...errors import PlanError
from ..placement import BIDIRECTIONAL, LINEAR, LOOP, VEE, Placement
from ..plan import Plan
from . import dualpipe, dualpipev, interleaved, interleaved_zb, one_f_one_b, vhalf, vmin, zb1p, zbv


class Schedule(NamedTuple):
    """What is known of a schedule.

    Args:
        placement: the name of its placement.
        generate: from ranks and micro-batches to the reference order.
        splits: whether backwards are split into I and W.
        default_cap: activations that the reference order holds on PP ranks, with any number of micro-batches.
        any_cap: whether there is a plan for every cap from `search.under_cap.LEAST_CAP` activations.
        by_cap: whether it is known for its cap: its plans hold no more, and are those of `search.under_cap`.
        stages_per_rank: stages of a rank, where the placement leaves their number open.
        with_stages: the same schedule with another number of stages a rank; None: the number is fixed.
    """

    placement: str
    generate: Callable[[int, int], Plan]
    splits: bool
    default_cap: Callable[[int], int]
    any_cap: bool = False
    by_cap: bool = False
    stages_per_rank: int | None = None
    with_stages: Callable[[int], Schedule] | None = None

    def on(self, num_ranks: int) -> Placement:
        """Where its stages are.

        Raises:
            PlanError: the rank count does not fit.
        """
        return Placement(self.placement, num_ranks, self.stages_per_rank)

    @property
    def parts(self) -> int:
        """Stages that one of a linear cut is divided into."""
        return self.on(2).parts

    @property
    def copies(self) -> int:
        """Copies of each stage's parameters."""
        return self.on(2).num_directions


def interleaved_of(stages: int) -> Schedule:
    """Interleaved 1F1B with so many stages a rank."""
    generate = partial(interleaved.generate, stages_per_rank=stages)
    cap = partial(interleaved.cap, stages_per_rank=stages)
    return Schedule(LOOP, generate, False, cap, stages_per_rank=stages, with_stages=interleaved_of)


def interleaved_zb_of(stages: int) -> Schedule:
    """Interleaved zero bubble with so many stages a rank."""
    generate = partial(interleaved_zb.generate, stages_per_rank=stages)
    cap = partial(interleaved.cap, stages_per_rank=stages)
    return Schedule(LOOP, generate, True, cap, stages_per_rank=stages, with_stages=interleaved_zb_of)


KNOWN = {
    "1f1b": Schedule(LINEAR, one_f_one_b.generate, False, lambda pp: pp),
    "zb1p": Schedule(LINEAR, zb1p.generate, True, lambda pp: pp),
    "dualpipe": Schedule(BIDIRECTIONAL, dualpipe.generate, True, lambda pp: pp + 1),
    "dualpipev": Schedule(VEE, dualpipev.generate, True, lambda pp: 2 * pp + 1),
    "zbv": Schedule(VEE, zbv.generate, True, lambda pp: 2 * pp, any_cap=True),
    "vhalf": Schedule(VEE, vhalf.generate, True, vhalf.cap, any_cap=True, by_cap=True),
    "vmin": Schedule(VEE, vmin.generate, True, vmin.cap, any_cap=True, by_cap=True),
    "interleaved": interleaved_of(interleaved.STAGES),
    "interleaved_zb": interleaved_zb_of(interleaved.STAGES),
}
SCHEDULES = tuple(KNOWN)  #: those of the package
STOCK = "1f1b-deepspeed"  #: in the place of one: DeepSpeed's own pipeline engine
TRIED = (2, 4)  #: stages a rank that are tried where the schedule takes any number


def register_schedule(name: str, schedule: Schedule) -> None:
    """Let a name stand for a schedule: in the configuration, for `auto`, and wherever a plan is made by name."""
    KNOWN[name] = schedule


def placement_of(schedule: str, num_ranks: int, stages_per_rank: int | None = None) -> Placement:
    """The placement that a schedule runs on.

    Raises:
        PlanError: see `known_schedule`; or the rank count does not fit.
    """
    return known_schedule(schedule, stages_per_rank).on(num_ranks)


def known_schedule(schedule: str, stages_per_rank: int | None = None) -> Schedule:
    """The schedule of a name.

    Args:
        schedule: its name.
        stages_per_rank: stages that a rank holds; None: the schedule's own number.

    Raises:
        PlanError: the name is unknown, or the schedule has a fixed number of stages a rank.
    """
    if schedule not in KNOWN:
        near = get_close_matches(schedule, KNOWN, n=1, cutoff=0.0)[0]
        raise PlanError(
            f"unknown schedule {schedule!r}: did you mean {near!r}? There are {', '.join(KNOWN)}, and plan files, "
            "whose names end in .csv or .json"
        )
    known = KNOWN[schedule]
    if stages_per_rank is None:
        return known
    if known.with_stages is None:
        others = ", ".join(name for name, each in KNOWN.items() if each.with_stages is not None)
        raise PlanError(f"{schedule} has a fixed number of stages a rank: leave stages_per_rank out, or use {others}")
    return known.with_stages(stages_per_rank)


def placements_on(num_ranks: int, most_stages: int) -> list[Placement]:
    """The placements of all schedules on so many ranks, with any number of stages a rank up to `most_stages` in all."""
    found: dict[Placement, None] = {}
    for stages in range(1, most_stages // num_ranks + 1):
        for known in with_stages(stages).values():
            try:
                found[known.on(num_ranks)] = None
            except PlanError:  # not on this number of ranks
                continue
    return [placement for placement in found if placement.num_stages <= most_stages]


def with_stages(stages_per_rank: int | None) -> dict[str, Schedule]:
    """All schedules by name, those whose number of stages a rank can be chosen with this one."""
    free = {name for name, each in KNOWN.items() if each.with_stages is not None}
    return {name: known_schedule(name, stages_per_rank if name in free else None) for name in KNOWN}


def tried(stages_per_rank: int | None) -> list[tuple[str, Schedule]]:
    """All schedules, those whose number of stages a rank can be chosen with this one; None: with each of `TRIED`."""
    numbers = TRIED if stages_per_rank is None else (stages_per_rank,)
    found = []
    for name, known in KNOWN.items():
        free = known.with_stages
        found += [(name, known)] if free is None else [(name, free(number)) for number in numbers]
    return found
