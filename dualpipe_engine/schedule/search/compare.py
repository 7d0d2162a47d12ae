"""Compare all schedules on equal work, and take the fastest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import inf

from ...errors import PlanError
from ..orders.registry import Schedule, with_stages
from ..placement import Placement
from ..plan import Plan
from ..timing.costs import UNIT, CostModel
from ..timing.simulate import peak_activations, peak_bytes, simulate
from .job_costs import Measurement
from .make_plan import make_plan


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
        stages_per_rank: what the plan was made with; None: the schedule has a fixed number.
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
    stages_per_rank: int | None = None
    plan: Plan | None = None

    @property
    def name(self) -> str:
        """The schedule, with its stages a rank where their number is open."""
        return self.schedule if self.stages_per_rank is None else f"{self.schedule} x{self.stages_per_rank}"

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
    stages_per_rank: int | None = None,
    schedules: Collection[str] | None = None,
) -> list[Row]:
    """Every schedule on the same model, batch and ranks.

    Args:
        num_ranks: pipeline ranks PP.
        num_micro: micro-batches of the batch.
        costs: costs of the model cut into PP stages; placements with more stages a rank run each of them in parts.
        activation_cap: limit of every rank in activations of a full stage; an activation of a `vee` stage is half of
            one. None: the default of each schedule.
        optimize: see `make_plan`.
        split_backward: see `make_plan`.
        job: adds the reduction of gradients and the limits of memory and layers; its costs are not read.
        stages_per_rank: of the schedules that take any number; None: their own.
        schedules: names of those to compare; None: all.

    Raises:
        PlanError: the costs are for another number of stages, or `stages_per_rank` is no such number.
    """
    costs.check(num_ranks)
    rows = []
    for schedule, known in with_stages(stages_per_rank).items():
        if schedules is not None and schedule not in schedules:
            continue
        stages = known.stages_per_rank
        try:
            placement = known.on(num_ranks)
            placed = costs.for_placement(placement)
            cap = None if activation_cap is None else int(activation_cap * placement.parts)
            cap = within(job, placement, cap, known.default_cap(num_ranks))
            row = planned(schedule, known, placed, num_ranks, num_micro, cap, optimize, split_backward)
        except PlanError as error:
            rows.append(Row(schedule, False, str(error), known.copies, stages_per_rank=stages))
            continue
        if job is not None:
            assert row.plan is not None
            memory = job.state_bytes.get(placement.key, 0) + max(peak_bytes(row.plan, placed))
            row = replace(row, reduction=job.reduction.get(placement.key, 0.0), memory=memory)
        rows.append(row)
    return rows


def planned(
    schedule: str,
    known: Schedule,
    costs: CostModel,
    num_ranks: int,
    num_micro: int,
    cap: int | None,
    optimize: bool,
    split_backward: bool,
) -> Row:
    """The row of one schedule, without what a job adds.

    Args:
        schedule: its name.
        known: what is known of it.
        costs: of the stages of its placement.
        num_ranks: see `compare`.
        num_micro: see `compare`.
        optimize: see `compare`.
        split_backward: see `compare`.
        cap: see `make_plan`.

    Raises:
        PlanError: there is no plan.
    """
    stages = known.stages_per_rank
    plan = make_plan(schedule, num_ranks, num_micro, costs, optimize, cap, split_backward, stages)
    timeline = simulate(plan, costs)
    peak = max(peak_activations(plan)) / plan.placement.parts
    row = Row(schedule, True, "", known.copies, timeline.makespan, max(timeline.bubble()), peak)
    return replace(row, cap=cap, stages_per_rank=stages, plan=plan)


def within(
    job: Measurement | None,
    placement: Placement,
    cap: int | None,
    default: int,
    bounds: Sequence[int] | None = None,
) -> int | None:
    """The activation cap, lowered to what the job's memory allows.

    Args:
        job: the measurement.
        placement: of the stages.
        cap: what is asked for; None: `default`.
        default: what the schedule is known for.
        bounds: see `Measurement.placed`.

    Raises:
        PlanError: the job has fewer layers than the placement has stages, or too little memory.
    """
    if job is None:
        return cap
    if job.layers < placement.num_stages:
        raise PlanError(
            f"{job.layers} layers cannot fill the {placement.num_stages} stages of placement {placement.name}"
        )
    left = job.memory_cap(placement, bounds)
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
    stages_per_rank: int | None = None,
) -> Row:
    """The fastest feasible row of `compare`, with the reason in a sentence; ties go to less memory.

    Raises:
        PlanError: no schedule is feasible.
    """
    rows = compare(num_ranks, num_micro, costs, activation_cap, optimize, split_backward, job, stages_per_rank)
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
    others = ", ".join(f"{row.name} {row.total:.6g}" for row in rest)
    reason = f"{first.name} has the shortest simulated step, {first.total:.6g} s"
    return replace(first, reason=f"{reason} (others: {others})" if others else reason)
