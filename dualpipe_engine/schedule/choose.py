"""Make plans by name, find the best candidate of a schedule, and compare schedules on equal work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import inf
from typing import NamedTuple

from ..errors import PlanError
from . import dualpipe, dualpipev, one_f_one_b, zb1p, zbv
from .collector import collector_paused
from .costs import UNIT, CostModel
from .fill import join, pair_up, safe_fuse, unpair, wfill
from .measurement import Measurement
from .placement import BIDIRECTIONAL, LINEAR, VEE, Placement
from .plan import Plan
from .simulate import peak_activations, peak_bytes, simulate

THETAS = (0.0, 0.3, 0.6)  #: how much of a W may delay the next op, see `wfill`
MANY_OPS = 20_000  #: plans with more ops try the first of THETAS and few orders, which keeps 140,000 ops within seconds


class _Schedule(NamedTuple):
    placement: str
    generate: Callable[[int, int], Plan]
    splits: bool  # into I and W
    default_cap: Callable[[int], int]  # activations of the reference order on PP ranks, any number of micro-batches


_KNOWN = {
    "1f1b": _Schedule(LINEAR, one_f_one_b.generate, False, lambda pp: pp),
    "zb1p": _Schedule(LINEAR, zb1p.generate, True, lambda pp: pp),
    "dualpipe": _Schedule(BIDIRECTIONAL, dualpipe.generate, True, lambda pp: pp + 1),
    "dualpipev": _Schedule(VEE, dualpipev.generate, True, lambda pp: 2 * pp + 1),
    "zbv": _Schedule(VEE, zbv.generate, True, lambda pp: 2 * pp),
}
SCHEDULES = tuple(_KNOWN)


@collector_paused()
def make_plan(
    schedule: str,
    num_ranks: int,
    num_micro: int,
    costs: CostModel = UNIT,
    optimize: bool = False,
    activation_cap: int | None = None,
    split_backward: bool = True,
) -> Plan:
    """Make the compute ops of a schedule.

    Args:
        schedule: one of SCHEDULES.
        num_ranks: pipeline ranks.
        num_micro: micro-batches of the batch.
        costs: costs of the stages of the schedule's own placement (2 * num_ranks stages for "dualpipev" and "zbv");
            `CostModel.for_placement` cuts the costs of one model for each. Only `optimize` uses them.
        optimize: False: the reference order. True: of the reference order and its variants (pairs split or made, W
            moved into idle gaps) the one with the smallest simulated makespan.
        activation_cap: activations, counted as by `peak_activations`, that no rank may exceed. None: what the reference
            order holds with many micro-batches, PP + 1 for "dualpipe".
        split_backward: False: only full backwards, for models that cannot split them into I and W.

    Raises:
        PlanError: the name is unknown, the rank count does not fit the schedule, the costs are for another number of
            stages, or no plan keeps within the cap.
    """
    known = _known(schedule)
    placement = Placement(known.placement, num_ranks)
    costs.check(placement.num_stages)
    reference = known.generate(num_ranks, num_micro)
    if not split_backward:
        reference = join(reference)
    if not optimize and activation_cap is None:
        return reference
    cap = known.default_cap(num_ranks) if activation_cap is None else activation_cap
    split = split_backward and known.splits
    plans = list(_candidates(reference, costs, cap, split)) if optimize else [reference]
    fitting = [plan for plan in plans if max(peak_activations(plan)) <= cap]
    if not fitting:
        tight = _candidates(reference, costs, 1, split) if optimize else plans
        smallest = min(max(peak_activations(plan)) for plan in tight)
        raise PlanError(
            f"{schedule} on {num_ranks} ranks with {num_micro} micro-batches holds more than activation_cap = {cap} "
            f"activations on some rank: the smallest cap that works is {smallest}"
        )
    if len(fitting) == 1:
        return fitting[0]
    plan = min(fitting, key=lambda candidate: simulate(candidate, costs).makespan)
    return plan if plan is reference else safe_fuse(plan, costs)


def placement_of(schedule: str, num_ranks: int) -> Placement:
    """The placement that a schedule runs on.

    Raises:
        PlanError: the name is unknown, or the rank count does not fit.
    """
    return Placement(_known(schedule).placement, num_ranks)


def _known(schedule: str) -> _Schedule:
    if schedule not in _KNOWN:
        near = get_close_matches(schedule, SCHEDULES, n=1, cutoff=0.0)[0]
        raise PlanError(f"unknown schedule {schedule!r}: did you mean {near!r}? There are {', '.join(SCHEDULES)}")
    return _KNOWN[schedule]


def _candidates(reference: Plan, costs: CostModel, cap: int, split: bool) -> Iterator[Plan]:
    thetas = (THETAS[:1] if reference.num_ops > MANY_OPS else THETAS) if split else ()
    yield reference
    for order in _orders(reference, costs):
        for theta in thetas:
            yield wfill(order, costs, cap, theta)
        if order != reference:
            yield order


def _orders(reference: Plan, costs: CostModel) -> Iterable[Plan]:
    """The reference and its variants: without pairs, with more pairs in the warm-up, and with up to PP/2 pairs fewer in
    the cool-down of each rank (the larger the plan, the fewer of these are tried).

    Of equals the first is taken. The order without pairs comes before those with some: its forwards do not wait for
    backwards, so that a late op delays less.
    """
    bases = reference, pair_up(reference, costs)
    most = min(reference.placement.num_stages // 2, MANY_OPS // reference.num_ops)
    shorter = (unpair(base, last) for base in bases for last in range(1, most + 1))
    return dict.fromkeys((reference, unpair(reference), *bases[1:], *shorter))


@dataclass(frozen=True)
class Row:
    """One schedule of a comparison.

    Args:
        schedule: its name.
        feasible: whether there is a plan.
        reason: why not, or "".
        parameter_copies: copies of each stage's parameters, 1 or 2.
        makespan: simulated seconds; infinite without a plan, as are the next two.
        bubble: seconds that the idlest rank is idle.
        peak_activations: most activations that a rank holds, in activations of a full stage (1/PP of the model).
        reduction: seconds that reducing gradients over the copies of a rank's stages adds; 0 where it is unknown.
        memory: bytes that the fullest rank needs beside what it has; None where they are unknown.
        cap: the limit of activations that the plan was made for, in those of the placement's own stages; None: the
            schedule's own.
        plan: the plan, or None.
    """

    schedule: str
    feasible: bool
    reason: str
    parameter_copies: int
    makespan: float = inf
    bubble: float = inf
    peak_activations: float = inf
    reduction: float = 0.0
    memory: int | None = None
    cap: int | None = None
    plan: Plan | None = None

    @property
    def total(self) -> float:
        """Seconds of a step, the optimizer aside."""
        return self.makespan + self.reduction


def compare(
    num_ranks: int,
    num_micro: int,
    costs: CostModel = UNIT,
    activation_cap: float | None = None,
    optimize: bool = True,
    split_backward: bool = True,
    job: Measurement | None = None,
) -> list[Row]:
    """Every schedule on the same model, batch and ranks.

    Args:
        num_ranks: pipeline ranks PP.
        num_micro: micro-batches of the batch.
        costs: costs of the model cut into PP stages; `vee` placements run each of them as two halves.
        activation_cap: limit of every rank in activations of a full stage; an activation of a `vee` stage is half of
            one. None: the default of each schedule.
        optimize: see `make_plan`.
        split_backward: see `make_plan`.
        job: adds the reduction of gradients and the limits of memory and layers; its costs are not read.

    Raises:
        PlanError: the costs are for another number of stages.
    """
    costs.check(num_ranks)
    rows = []
    for schedule, known in _KNOWN.items():
        parts = 2 if known.placement == VEE else 1
        copies = 2 if known.placement == BIDIRECTIONAL else 1
        cap = None if activation_cap is None else int(activation_cap * parts)
        try:
            placement = Placement(known.placement, num_ranks)
            placed = costs.for_placement(placement)
            cap = _within(job, placement, cap, known.default_cap(num_ranks))
            plan = make_plan(schedule, num_ranks, num_micro, placed, optimize, cap, split_backward)
        except PlanError as error:
            rows.append(Row(schedule, False, str(error), copies))
            continue
        timeline = simulate(plan, placed)
        peak = max(peak_activations(plan)) / parts
        row = Row(schedule, True, "", copies, timeline.makespan, max(timeline.bubble()), peak, cap=cap, plan=plan)
        if job is not None:
            state = job.state_bytes.get(placement.name, 0)
            memory = state + max(peak_bytes(plan, placed))
            row = replace(row, reduction=job.reduction.get(placement.name, 0.0), memory=memory)
        rows.append(row)
    return rows


def _within(job: Measurement | None, placement: Placement, cap: int | None, default: int) -> int | None:
    """The activation cap, lowered to what the job's memory allows.

    Raises:
        PlanError: the job has fewer layers than the placement has stages, or too little memory.
    """
    if job is None:
        return cap
    if job.layers < placement.num_stages:
        raise PlanError(
            f"{job.layers} layers cannot fill the {placement.num_stages} stages of placement {placement.name}"
        )
    left = job.memory_cap(placement)
    return cap if left is None or left >= (default if cap is None else cap) else left


def fastest(rows: Sequence[Row]) -> Row | None:
    """The feasible row with the shortest step; ties go to fewer parameters, then to fewer activations."""
    feasible = [row for row in rows if row.feasible]
    return min(feasible, key=lambda row: (row.total, row.parameter_copies, row.peak_activations), default=None)


def best(
    num_ranks: int,
    num_micro: int,
    costs: CostModel = UNIT,
    activation_cap: float | None = None,
    optimize: bool = True,
    split_backward: bool = True,
    job: Measurement | None = None,
) -> Row:
    """The fastest feasible row of `compare`, with the reason in a sentence; ties go to less memory.

    Raises:
        PlanError: no schedule is feasible.
    """
    rows = compare(num_ranks, num_micro, costs, activation_cap, optimize, split_backward, job)
    return best_of(rows)


def best_of(rows: Sequence[Row]) -> Row:
    """`fastest`, with the reason in a sentence.

    Raises:
        PlanError: no schedule is feasible.
    """
    first = fastest(rows)
    if first is None:
        raise PlanError("no schedule is feasible: " + "; ".join(row.reason for row in rows))
    rest = sorted((row for row in rows if row.feasible and row is not first), key=lambda row: row.total)
    others = ", ".join(f"{row.schedule} {row.total:.6g}" for row in rest)
    reason = f"{first.schedule} has the shortest simulated step, {first.total:.6g} s"
    return replace(first, reason=f"{reason} (others: {others})" if others else reason)
