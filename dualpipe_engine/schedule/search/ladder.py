"""Every schedule under the memory of a measured job: as it is, or with the cheapest change that makes it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

from ..passes.offload import least_that_fits, offload
from ..timing.simulate import peak_activations, peak_bytes, simulate
from .compare import Row, compare
from .job_costs import Measurement, gib


@dataclass(frozen=True)
class Rung(Row):
    """One schedule of a comparison, with some of its activations computed again or in host memory, or without.

    Args:
        fewer: the value of "offload_activations"; `plan` is without the copies, the other numbers are with them.
        recompute: what the layers list is computed again.
        plain: the schedule as it is, where that takes more memory than there is.
        tried: changes that make it take less, whether they make it fit or not.
    """

    fewer: bool | int = False
    recompute: bool = False
    plain: Rung | None = None
    tried: tuple[Rung, ...] = ()

    @property
    def change(self) -> str:
        """The keys that make it differ from the schedule as it is."""
        cap = None if self.cap is None else f'"activation_cap": {self.cap}'
        moved = None if self.fewer is False else f'"offload_activations": {str(self.fewer).lower()}'
        return ", ".join(filter(None, ('"recompute": true' if self.recompute else None, cap, moved)))


def under_memory(
    job: Measurement,
    num_micro: int,
    *,
    fewer: bool | int | None = None,
    may_recompute: bool = True,
    activation_cap: float | None = None,
    optimize: bool = True,
    split_backward: bool = True,
    stages_per_rank: int | None = None,
) -> list[Rung]:
    """Every schedule on a measured job. One that takes more memory than there is gets a cap on its activations or has
    some of them in host memory, with what the layers list computed again or without, whichever is fastest.

    Args:
        job: the measurement.
        num_micro: micro-batches of the batch.
        fewer: the value of "offload_activations" for all schedules; None: those that need it get the smallest number
            that makes them fit.
        may_recompute: try it, where the job was measured with it.
        activation_cap: see `compare`, as for the others.

    Raises:
        PlanError: see `compare`.
    """
    every = partial(
        compare,
        job.ranks,
        num_micro,
        activation_cap=activation_cap,
        optimize=optimize,
        split_backward=split_backward,
        stages_per_rank=stages_per_rank,
    )
    given = False if fewer is None else fewer
    free = replace(job, memory_bytes=None)
    plain = [_moved(row, given, job) for row in every(costs=job.costs, job=free)]
    large = {rung.schedule: rung for rung in plain if not _fits(rung, job)}
    tried = {name: _changed(every, rung, fewer, job) for name, rung in large.items()}
    if may_recompute and large and job.recomputed is not None:
        again = replace(job, costs=job.recomputed)
        for row in every(costs=again.costs, job=free, schedules=large):
            rung = replace(_moved(row, given, again), recompute=True)
            tried[row.schedule].append(rung)
            if not _fits(rung, job):
                more = _changed(every, rung, fewer, again)
                tried[row.schedule] += [replace(each, recompute=True) for each in more]
    return [_made_to_fit(rung, tried[rung.schedule], job) if rung.schedule in large else rung for rung in plain]


def _changed(every: Callable[..., list[Row]], plain: Rung, fewer: bool | int | None, job: Measurement) -> list[Rung]:
    """The schedule under a cap, if there is a plan, and with some activations in host memory, if it may."""
    [capped] = every(costs=job.costs, job=job, schedules=(plain.schedule,))
    found = [_moved(capped, plain.fewer, job)] if capped.feasible else []
    if fewer is None:
        most = _most(plain)
        least = least_that_fits(most, lambda number: _fits(_moved(plain, number, job), job))
        found.append(_moved(plain, most if least is None else least, job))
    return found


def _made_to_fit(plain: Rung, tried: list[Rung], job: Measurement) -> Rung:
    fit = [rung for rung in tried if _fits(rung, job)]
    if fit:
        return replace(min(fit, key=lambda rung: rung.total), plain=plain, tried=tuple(tried))
    assert plain.plan is not None and job.memory_bytes is not None
    least = min(rung.memory or 0 for rung in (plain, *tried))
    state = job.state_bytes[plain.plan.placement.key]
    reason = (
        f"{plain.schedule} needs {gib(least)} at least, {gib(state)} of them for weights, gradients and optimizer "
        f"state, but {gib(job.memory_bytes)} are free"
    )
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
