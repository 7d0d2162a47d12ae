"""Every schedule under the memory of a measured job: as it is, on a cut of the layers that makes it faster, or with the
cheapest change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from ...errors import PlanError
from ..cuts.counts import counts_text
from ..cuts.fastest import best_cut
from ..cuts.together import kept_together
from ..orders.registry import Schedule, tried
from ..passes.offload import least_that_fits, offload
from ..plan import Plan
from ..search.compare import Row, planned, within
from ..search.job_costs import Measurement, gib
from ..search.layer_costs import LayerCosts
from ..timing.costs import CostModel
from ..timing.simulate import peak_activations, peak_bytes, simulate


@dataclass(frozen=True)
class Fitted(Row):
    """One schedule of a comparison, as it is or changed.

    Args:
        fewer: the value of "offload_activations"; `plan` is without the copies, the other numbers are with them.
        recompute: what the layers list is computed again.
        bounds: of the stages on a cut that was searched; None: the job's own cut.
        plain: the schedule as it is, where something was tried beside.
        tried: what was, whether it fits or not.
    """

    fewer: bool | int = False
    recompute: bool = False
    bounds: tuple[int, ...] | None = None
    plain: Fitted | None = None
    tried: tuple[Fitted, ...] = ()

    @classmethod
    def of(cls, row: Row, **changed: Any) -> Fitted:
        """The row, with these fields changed or added."""
        return cls(**{each.name: getattr(row, each.name) for each in fields(row)} | changed)

    @property
    def counts(self) -> str | None:
        """The cut as "partition_method" takes it."""
        return None if self.bounds is None else counts_text(self.bounds)

    @property
    def change(self) -> str:
        """The keys that make it differ from the schedule as it is."""
        cut = None if self.bounds is None else f'"partition_method": "{self.counts}"'
        cap = None if self.cap is None else f'"activation_cap": {self.cap}'
        moved = None if self.fewer is False else f'"offload_activations": {str(self.fewer).lower()}'
        return ", ".join(filter(None, (cut, '"recompute": true' if self.recompute else None, cap, moved)))


@dataclass(frozen=True)
class Asked:
    """What the configuration says of all schedules.

    Args:
        num_micro: micro-batches of the batch.
        fewer: the value of "offload_activations"; None: those that need it get the smallest number that makes them fit.
        may_recompute: try it, where the job was measured with it.
        may_cut: try other cuts, where layers were measured.
        activation_cap: see `compare`.
        optimize: see `compare`.
        split_backward: see `compare`.
        stages_per_rank: of the schedules that take any number; None: each of `TRIED`.
    """

    num_micro: int
    fewer: bool | int | None = None
    may_recompute: bool = True
    may_cut: bool = True
    activation_cap: float | None = None
    optimize: bool = True
    split_backward: bool = True
    stages_per_rank: int | None = None


def under_memory(job: Measurement, asked: Asked) -> list[Fitted]:
    """Every schedule on a measured job, the fastest way that was found to run it.

    On a cut of its own a schedule may be faster, and hold less. Where stages of the linear cut are divided and layers
    were measured it always has one, since the costs of the parts are known there. One that takes more memory than there
    is gets a cap on its activations or has some of them in host memory, with what the layers list computed again or
    without.

    Raises:
        PlanError: the costs are for another number of stages, or `stages_per_rank` is no such number.
    """
    job.costs.check(job.ranks)
    return [_fastest(_Way(job, asked, name, known)) for name, known in tried(asked.stages_per_rank)]


def fastest_cut(layers: LayerCosts, costs: CostModel, plan: Plan) -> tuple[int, ...]:
    """Bounds of the cut on which a plan is fastest, of those that `best_cut` tries.

    Args:
        layers: what they take.
        costs: of the stages of the linear cut.
        plan: what runs.

    Raises:
        PlanError: there are fewer layers than stages, or nothing takes time.
    """
    count = len(layers.seconds)
    single, model = layers.costs_of(costs, range(count + 1)), layers.costs_of(costs, (0, count))
    weights = [sum(single.at(layer)[:3]) for layer in range(count)]
    f, i, w, fb = model.at(0)
    even = CostModel(f, i, w, None if costs.fb is None else fb, costs.comm)
    found = best_cut(weights, plan.placement, even, lambda _: plan).bounds
    return tuple(kept_together(found, layers.with_next, plan.placement))


@dataclass(frozen=True)
class _Way:
    """A schedule on one cut, with what the layers list computed again or not."""

    job: Measurement
    asked: Asked
    schedule: str
    known: Schedule
    bounds: tuple[int, ...] | None = None
    recompute: bool = False

    @cached_property
    def measured(self) -> Measurement:
        return self.job.again(self.recompute)

    def row(self, limited: bool = False) -> Fitted:
        """With the cap of the configuration, or lowered to what memory allows.

        Raises:
            PlanError: there is no plan.
        """
        job, asked, known = self.measured, self.asked, self.known
        placement = known.on(job.ranks)
        cap = None if asked.activation_cap is None else int(asked.activation_cap * placement.parts)
        if not limited:
            job = replace(job, memory_bytes=None)
        cap = within(job, placement, cap, known.default_cap(job.ranks), self.bounds)
        shape = job.placed(placement, self.bounds), job.ranks, asked.num_micro, cap
        row = planned(self.schedule, known, *shape, asked.optimize, asked.split_backward)
        return self.moved(row, asked.fewer or False)

    def moved(self, row: Row, fewer: bool | int) -> Fitted:
        """With as many activations in host memory."""
        assert row.plan is not None
        placement = row.plan.placement
        costs = self.measured.placed(placement, self.bounds)
        plan = offload(row.plan, fewer, costs)
        timeline = simulate(plan, costs)
        return Fitted.of(
            row,
            makespan=timeline.makespan,
            bubble=max(timeline.bubble()),
            peak_activations=max(peak_activations(plan)) / placement.parts,
            reduction=self.job.reduction.get(placement.key, 0.0),
            memory=(self.job.state(placement, self.bounds) or 0) + max(peak_bytes(plan, costs)),
            fewer=fewer,
            recompute=self.recompute,
            bounds=self.bounds,
        )

    def fits(self, row: Fitted) -> bool:
        if row.plan is None or self.job.memory_bytes is None or row.plan.placement.key not in self.job.state_bytes:
            return True
        assert row.memory is not None
        return row.memory <= self.job.memory_bytes

    def changed(self, row: Fitted) -> Iterator[Fitted]:
        """What does not fit under a cap, if there is a plan, and with some activations in host memory, if it may."""
        with suppress(PlanError):
            yield self.row(limited=True)
        if self.asked.fewer is None:
            assert row.plan is not None
            most = max(peak_activations(row.plan))
            least = least_that_fits(most, lambda number: self.fits(self.moved(row, number)))
            yield self.moved(row, most if least is None else least)

    def others(self, plain: Fitted) -> Iterator[_Way]:
        """The same on another cut, and where the schedule does not fit as it is with what is listed computed again."""
        cuts, layers = [self.bounds], self.job.of_layers
        if self.asked.may_cut and layers is not None:
            assert plain.plan is not None
            found = fastest_cut(layers, self.job.costs, plain.plan)
            own = layers.bounds if len(found) == len(layers.bounds) else None
            cuts += [found] if found != own else []
        again = self.asked.may_recompute and self.job.recomputed is not None and not self.fits(plain)
        for each in (False, True)[: 1 + again]:
            yield from (replace(self, bounds=cut, recompute=each) for cut in cuts if each or cut != self.bounds)


def _fastest(way: _Way) -> Fitted:
    job, known = way.job, way.known
    try:
        placement = known.on(job.ranks)
        plain = way.row()
    except PlanError as error:
        return Fitted(way.schedule, False, str(error), known.copies, stages_per_rank=known.stages_per_rank)
    found = [] if way.fits(plain) else list(way.changed(plain))
    for other in way.others(plain):
        with suppress(PlanError):
            row = other.row()
            found += [row] if way.fits(row) else [row, *other.changed(row)]
    if not found:
        return plain
    able = (plain, *found)
    if placement.parts > 1 and any(each.bounds for each in found):  # parts of a stage need not be alike
        able = tuple(each for each in found if each.bounds)
    if fit := [each for each in able if way.fits(each)]:
        return replace(min(fit, key=lambda each: each.total), plain=plain, tried=tuple(found))
    assert job.memory_bytes is not None
    least = min(able, key=lambda each: each.memory or 0)
    reason = (
        f"{plain.name} needs {gib(least.memory or 0)} at least"
        + (f", with {least.change}" if least.change else "")
        + f", {gib(job.state(placement, least.bounds) or 0)} of them for weights, gradients and optimizer state, but "
        f"{gib(job.memory_bytes)} are free"
    )
    return Fitted(
        plain.schedule,
        False,
        reason,
        plain.parameter_copies,
        memory=least.memory,
        stages_per_rank=plain.stages_per_rank,
        plain=plain,
        tried=tuple(found),
    )
