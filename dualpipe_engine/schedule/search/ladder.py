"""Every schedule under the memory of a measured job: as it is, or with the cheapest change that makes it fit."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from functools import partial

from ..passes.offload import offload
from ..timing.simulate import peak_activations, peak_bytes, simulate
from .compare import Row, compare
from .job_costs import Measurement, gib


@dataclass(frozen=True)
class Rung(Row):
    """One schedule of a comparison, with its activations in host memory or without.

    Args:
        fewer: the value of "offload_activations"; `plan` is without the copies, the other numbers are with them.
        plain: the schedule as it is, where that takes more memory than there is.
        tried: changes that make it take less, whether they make it fit or not.
    """

    fewer: bool | int = False
    plain: Rung | None = None
    tried: tuple[Rung, ...] = ()

    @property
    def change(self) -> str:
        """The keys that make it differ from the schedule as it is."""
        cap = None if self.cap is None else f'"activation_cap": {self.cap}'
        moved = None if self.fewer is False else f'"offload_activations": {str(self.fewer).lower()}'
        return ", ".join(filter(None, (cap, moved)))


def under_memory(
    job: Measurement,
    num_micro: int,
    *,
    fewer: bool | int | None = None,
    activation_cap: float | None = None,
    optimize: bool = True,
    split_backward: bool = True,
    stages_per_rank: int | None = None,
) -> list[Rung]:
    """Every schedule on a measured job. One that takes more memory than there is gets a cap on its activations or has
    some of them in host memory, whichever is faster.

    Args:
        job: the measurement.
        num_micro: micro-batches of the batch.
        fewer: the value of "offload_activations" for all schedules; None: those that need it get the smallest number
            that makes them fit.
        activation_cap: see `compare`, as for the others.

    Raises:
        PlanError: see `compare`.
    """
    every = partial(
        compare,
        job.ranks,
        num_micro,
        job.costs,
        activation_cap,
        optimize,
        split_backward,
        stages_per_rank=stages_per_rank,
    )
    given = False if fewer is None else fewer
    plain = [_moved(row, given, job) for row in every(job=replace(job, memory_bytes=None))]
    large = {rung.schedule for rung in plain if not _fits(rung, job)}
    capped = {row.schedule: _moved(row, given, job) for row in every(job=job, schedules=large)} if large else {}
    return [_made_to_fit(rung, capped[rung.schedule], fewer, job) if rung.schedule in large else rung for rung in plain]


def _made_to_fit(plain: Rung, capped: Rung, fewer: bool | int | None, job: Measurement) -> Rung:
    tried = [capped] if capped.feasible else []
    if fewer is None:
        numbers = range(1, 1 + _most(plain))
        fitting = bisect_left(numbers, True, key=lambda number: _fits(_moved(plain, number, job), job))
        tried.append(_moved(plain, numbers[min(fitting, len(numbers) - 1)], job))
    fit = [rung for rung in tried if _fits(rung, job)]
    if fit:
        return replace(min(fit, key=lambda rung: rung.total), plain=plain, tried=tuple(tried))
    assert plain.plan is not None and job.memory_bytes is not None
    least = min(rung.memory or 0 for rung in (plain, *tried))
    reason = f"{plain.schedule} needs {gib(least)} at least, but {gib(job.memory_bytes)} are free"
    if job.state_bytes[plain.plan.placement.key] >= job.memory_bytes:
        reason = capped.reason  # which says that no activation fits beside the weights
    copies = plain.parameter_copies
    return Rung(plain.schedule, False, reason, copies, memory=least, plain=plain, tried=tuple(tried))


def _most(plain: Rung) -> int:
    assert plain.plan is not None
    return max(peak_activations(plain.plan))


def _fits(rung: Rung, job: Measurement) -> bool:
    if rung.plan is None or job.memory_bytes is None or rung.plan.placement.key not in job.state_bytes:
        return True
    assert rung.memory is not None
    return rung.memory <= job.memory_bytes


def _moved(row: Row, fewer: bool | int, job: Measurement) -> Rung:
    """The row with as many activations in host memory."""
    same = {each.name: getattr(row, each.name) for each in fields(Row)}
    if row.plan is None or fewer is False:
        return Rung(**same)
    placement = row.plan.placement
    costs = job.costs.for_placement(placement)
    plan = offload(row.plan, fewer, costs)
    timeline = simulate(plan, costs)
    return replace(
        Rung(**same),
        makespan=timeline.makespan,
        bubble=max(timeline.bubble()),
        peak_activations=max(peak_activations(plan)) / placement.parts,
        memory=job.state_bytes.get(placement.key, 0) + max(peak_bytes(plan, costs)),
        fewer=fewer,
    )
