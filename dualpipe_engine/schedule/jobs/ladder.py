"""The memory ladder of a whole job: what recomputation and offload cost each schedule, and the cheapest that fits.

Each schedule has one optimized plan for each number of stages a rank, and where it splits backwards one with full
backwards, which keeps nothing from I to W; both once more for another cut than that of equal work, where one is faster.
On every rung it runs against the costs that the rung leads to: what is
computed again is added to the backward, never a transfer, and copies to host memory run at the bandwidth of PCIe. Bytes
are those of `model_memory` for bf16 weights, fp32 gradients and Adam under ZeRO-1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from ...errors import PlanError
from ..orders.registry import Schedule, tried
from ..passes.offload import least_that_fits, offload
from ..plan import Plan
from ..search.make_plan import make_plan
from ..timing.costs import CostModel
from ..timing.simulate import makespan_of, peak_activations
from .activations import Names, unknown_names
from .checkpointed import Keeping
from .flows import OWN_RECOMPUTED, TRANSFORMERS_RECOMPUTED
from .hardware import Hardware
from .job import Job
from .model_memory import TRAINING, at_peak, fullest, with_bytes
from .model_shape import LayerShape, ModelShape
from .stage_times import in_fp8, job_cuts, layer_seconds, product_rate, reduction_seconds, stage_costs

LABELS = ("norms", "activation functions", "up-projections")  #: of the names of OWN_RECOMPUTED, for people
WIDTH = TRAINING.weights


class Rung(NamedTuple):
    """What is computed again.

    Args:
        label: for people.
        names: of "recompute".
        whole: whole layers are, by "activation_checkpoint_interval": 1.
    """

    label: str = "-"
    names: Names = ()
    whole: bool = False


PLAIN, WHOLE = Rung(), Rung("whole layers", whole=True)


@dataclass(frozen=True)
class Outcome:
    """A schedule on a rung.

    Args:
        rung: what is computed again.
        split: "split_backward": whether I and W run apart; None: the schedule never has them apart.
        away: "offload_activations".
        bounds: of the stages, where the cut is not that of equal work.
        step: seconds, reduction of gradients included.
        memory: bytes of the fullest rank.
        fits: whether these are no more than there are.
    """

    rung: Rung
    split: bool | None
    away: bool | int
    bounds: tuple[int, ...] | None
    step: float
    memory: int
    fits: bool


@dataclass(frozen=True)
class Work:
    """What all schedules do.

    Args:
        model: what is trained.
        job: ranks and batch.
        hardware: of the cluster.
        memory: bytes of a device.
        own: the layers are those of `dualpipe_engine.models`, not those of transformers.
    """

    model: ModelShape
    job: Job
    hardware: Hardware
    memory: float
    own: bool = False

    @property
    def fp8(self) -> bool:
        return in_fp8(self.job, self.hardware)

    @property
    def rungs(self) -> list[Rung]:
        """Nothing; what DeepSeek-V3 computes again, name by name; whole layers."""
        flows = [layer.flow(WIDTH) for layer in self.model.layers]
        listed = zip(LABELS, OWN_RECOMPUTED if self.own else TRANSFORMERS_RECOMPUTED, strict=True)
        known = [(label, name) for label, name in listed if not unknown_names(flows, (name,))]
        named = [known[:count] for count in range(1, len(known) + 1)]
        rungs = [Rung(", ".join(label for label, _ in each), tuple(name for _, name in each)) for each in named]
        return [PLAIN, *rungs, WHOLE]


class _Way(NamedTuple):
    """What there is a plan for.

    Args:
        bounds: the cut.
        split: whether I and W run apart, see `Outcome`.
    """

    bounds: tuple[int, ...]
    split: bool | None


class Ladder:
    """One schedule on every rung.

    Args:
        work: what it does.
        schedule: its name.
        known: what is known of it.

    Attributes:
        reason: why there is no plan, or "".
    """

    def __init__(self, work: Work, schedule: str, known: Schedule) -> None:
        self.work, self.schedule, self.stages_per_rank, self.reason = work, schedule, known.stages_per_rank, ""
        self._plans: dict[_Way, Plan] = {}
        self._away: dict[tuple[_Way, Rung], Outcome] = {}
        try:
            self._placement = known.on(work.job.ranks)
            cuts = job_cuts(work.model, self._placement, work.job, work.hardware)
            for split in (True, False) if known.splits else (None,):
                self._plans |= self._planned(cuts, split)
        except PlanError as error:
            self.reason = str(error)
            return
        self._equal_work = cuts[0]
        bounds = {way.bounds for way in self._plans}
        self._reduction = {each: self._reduction_of(each) for each in bounds}
        self._costs = {(each, rung): self._costs_on(each, rung) for each in bounds for rung in work.rungs}

    @property
    def plain(self) -> Outcome:
        """As it is."""
        return self._kept[0]

    @cached_property
    def cheapest(self) -> Outcome | None:
        """The fastest that fits; of equals the one that changes least. None: none fits."""
        best: Outcome | None = None
        for each in sorted(self._kept, key=lambda each: each.step):  # offload makes none faster
            if best is not None and each.step >= best.step:
                break
            found = each if each.fits else self._offloaded(each)
            if found.fits and (best is None or found.step < best.step):
                best = found
        return best

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """All; what does not fit also with the least offload that makes it fit, or all."""
        found = []
        for each in self._kept:
            found += [each] if each.fits or each.rung.whole else [each, self._offloaded(each)]
        return found

    @property
    def least(self) -> Outcome:
        """The one with the fewest bytes."""
        return min(self.outcomes, key=lambda each: each.memory)

    @cached_property
    def _kept(self) -> list[Outcome]:
        """Without offload."""
        return [self._outcome(way, rung, False) for way in self._plans for rung in self.work.rungs]

    def _planned(self, cuts: Sequence[tuple[int, ...]], split: bool | None) -> dict[_Way, Plan]:
        """The plan for the first cut, and for the fastest."""
        job, apart, plans, steps = self.work.job, split is not False, {}, {}
        for bounds in cuts:
            costs = stage_costs(self.work.model, bounds, job, self.work.hardware)
            shape = self.schedule, job.ranks, job.micro_batches, costs, True, None, apart, self.stages_per_rank
            plans[bounds] = make_plan(*shape)
            steps[bounds] = makespan_of(plans[bounds], costs) + self._reduction_of(bounds)
        return {_Way(each, split): plans[each] for each in (cuts[0], min(cuts, key=lambda cut: steps[cut]))}

    def _offloaded(self, kept: Outcome) -> Outcome:
        """With the least offload that fits, or all. Of whole layers DeepSpeed keeps the inputs: none."""
        if kept.rung.whole:
            return kept
        key = way, rung = _Way(kept.bounds or self._equal_work, kept.split), kept.rung
        if key not in self._away:
            plan, costs, limit = self._plans[way], self._costs[way.bounds, rung], self.work.memory
            fewer = least_that_fits(
                max(peak_activations(plan)),
                lambda number: self._bytes(offload(plan, number, costs), way.bounds, rung) <= limit,
            )
            self._away[key] = self._outcome(way, rung, True if fewer is None else fewer)
        return self._away[key]

    def _outcome(self, way: _Way, rung: Rung, away: bool | int) -> Outcome:
        costs = self._costs[way.bounds, rung]
        plan = offload(self._plans[way], away, costs)
        step, size = makespan_of(plan, costs) + self._reduction[way.bounds], self._bytes(plan, way.bounds, rung)
        cut = None if way.bounds == self._equal_work else way.bounds
        return Outcome(rung, way.split, away, cut, step, size, size <= self.work.memory)

    def _reduction_of(self, bounds: Sequence[int]) -> float:
        work = self.work
        return reduction_seconds(work.model, bounds, self._placement, work.job, work.hardware)

    def _costs_on(self, bounds: Sequence[int], rung: Rung) -> CostModel:
        model, work = self.work.model, self.work
        repeated = [repeated_seconds(layer, rung, work) for layer in model.layers]
        costs = stage_costs(model, bounds, work.job, work.hardware, repeated, rung.whole)
        costs = with_bytes(costs, model, bounds, work.job.tokens, self._keeping(rung))
        assert isinstance(costs.activation_bytes, tuple)
        link = work.hardware.pcie * work.hardware.network_efficiency
        return replace(costs, copy=tuple(size / link for size in costs.activation_bytes))

    def _bytes(self, plan: Plan, bounds: tuple[int, ...], rung: Rung) -> int:
        """Of the fullest rank."""
        work, costs = self.work, self._costs[bounds, rung]
        peaks = at_peak(plan, costs, work.model, bounds, work.job.tokens, self._keeping(rung))
        return fullest(work.model, bounds, self._placement, work.job, peaks)

    def _keeping(self, rung: Rung) -> Keeping:
        return Keeping(WIDTH, rung.names, int(rung.whole), self.work.fp8)


def climb(work: Work, stages_per_rank: int | None = None) -> Iterator[Ladder]:
    """Every schedule that `tried` lists."""
    for name, known in tried(stages_per_rank):
        ladder = Ladder(work, name, known)
        if not ladder.reason:
            _ = ladder.cheapest  # so that whoever counts ladders counts the work
        yield ladder


def chosen(ladders: Sequence[Ladder]) -> Ladder | None:
    """The schedule with the fastest rung that fits; None: none fits."""
    fitting = [(each.cheapest.step, index) for index, each in enumerate(ladders) if not each.reason and each.cheapest]
    return ladders[min(fitting)[1]] if fitting else None


def repeated_seconds(layer: LayerShape, rung: Rung, work: Work) -> float:
    """Seconds of a layer's forward that its backward computes again for one micro-batch."""
    job, hardware = work.job, work.hardware
    if rung.whole:
        whole = layer_seconds(layer, job, hardware)
        return whole.f + (0.0 if work.model.own else whole.heads)
    products, moved = layer.flow(WIDTH).repeated(rung.names, WIDTH, work.fp8)
    seconds = 2 * products / product_rate(layer, job, hardware)
    return job.tokens * (seconds + moved / (hardware.bandwidth * hardware.memory_efficiency))
