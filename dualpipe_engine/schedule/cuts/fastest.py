"""Choose the cut of a model into stages by simulation, and show what it gains for every schedule.

That all ranks have the same work is not enough. Ranks run in step, so stages of different size on one rank make others
wait, and a cut with slightly larger rank loads but more even stages is often faster. The clock decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from ...errors import PlanError
from ..orders.registry import with_stages
from ..placement import LINEAR, Placement
from ..plan import Plan
from ..search.make_plan import make_plan
from ..timing.costs import CostModel
from ..timing.simulate import simulate
from .balanced import balance_pairs, balanced_cuts, equal_counts, stage_loads

SLACKS = (0.0, 0.02, 0.05, 0.1)  #: rank loads that are tried, as what they may exceed the least by


@dataclass(frozen=True)
class Cut:
    """A cut of layers into stages.

    Args:
        bounds: stage s has layers bounds[s] to bounds[s+1] - 1.
        makespan: simulated, in the unit of the layers' times.
        plan: what was simulated.
    """

    bounds: tuple[int, ...]
    makespan: float
    plan: Plan

    @property
    def layers(self) -> list[int]:
        """Number of layers of each stage."""
        return [stop - start for start, stop in pairwise(self.bounds)]


def costs_of_cut(weights: Sequence[float], bounds: Sequence[int], costs: CostModel) -> CostModel:
    """Costs of the stages of a cut.

    Args:
        weights: seconds of each layer's forward and backward, without overlap.
        bounds: the cut.
        costs: how this time divides into F, I and W, and what pairs of F and B save, in any unit and the same for all
            stages; its `comm` is in the unit of `weights`.

    Raises:
        PlanError: the costs differ between stages, or are all zero.
    """
    if any(isinstance(value, tuple) for value in (costs.f, costs.i, costs.w, costs.fb)):
        raise PlanError("times of layers say what each stage costs: give one F, I, W and F&B for all of them")
    f, i, w, fb = costs.at(0)
    if f + i + w == 0:
        raise PlanError("times of layers cannot be divided into F, I and W of no length")
    loads = [load / (f + i + w) for load in stage_loads(weights, bounds)]

    def each(cost: float) -> tuple[float, ...]:
        return tuple(cost * load for load in loads)

    return replace(costs, f=each(f), i=each(i), w=each(w), fb=each(fb))


def best_cut(
    weights: Sequence[float], placement: Placement, costs: CostModel, plan_for: Callable[[CostModel], Plan]
) -> Cut:
    """The fastest of some cuts: rank loads balanced, exactly and with slack for even stages; even stages; equal counts.

    Args:
        weights: see `costs_of_cut`.
        placement: where stages live.
        costs: see `costs_of_cut`.
        plan_for: gives the plan for the costs of the stages of a cut.

    Raises:
        PlanError: the layers cannot be cut, or there is no plan.
    """
    cuts = (_simulated(bounds, weights, costs, plan_for) for bounds in candidates(weights, placement))
    return min(cuts, key=lambda cut: cut.makespan)


def candidates(weights: Sequence[float], placement: Placement) -> list[tuple[int, ...]]:
    """The cuts that `best_cut` tries, the one with the most even rank loads first.

    Args, Raises: see `best_cut`.
    """
    one_a_rank = Placement(LINEAR, placement.num_stages)
    found = [
        *balanced_cuts(weights, placement, SLACKS),
        balance_pairs(weights, one_a_rank),
        equal_counts(len(weights), placement.num_stages),
    ]
    return list(dict.fromkeys(found))


def _simulated(
    bounds: tuple[int, ...], weights: Sequence[float], costs: CostModel, plan_for: Callable[[CostModel], Plan]
) -> Cut:
    placed = costs_of_cut(weights, bounds, costs)
    plan = plan_for(placed)
    return Cut(bounds, simulate(plan, placed).makespan, plan)


@dataclass(frozen=True)
class CutRow:
    """One schedule with two cuts of the same layers.

    Args:
        schedule: its name.
        equal: the same number of layers in each stage; None where there is no plan.
        best: what `best_cut` finds.
        reason: why there is no plan, or "".
    """

    schedule: str
    equal: Cut | None = None
    best: Cut | None = None
    reason: str = ""

    @property
    def saved(self) -> float:
        """Part of the makespan with equal counts that the best cut saves, 0..1."""
        if self.equal is None or self.best is None or not self.equal.makespan:
            return 0.0
        return 1 - self.best.makespan / self.equal.makespan


def compare_cuts(
    weights: Sequence[float],
    num_ranks: int,
    num_micro: int,
    costs: CostModel,
    activation_cap: float | None = None,
    optimize: bool = True,
    stages_per_rank: int | None = None,
) -> list[CutRow]:
    """Every schedule with equal layer counts and with the best cut.

    Args:
        weights: see `costs_of_cut`.
        num_ranks: pipeline ranks.
        num_micro: micro-batches of the batch.
        costs: see `costs_of_cut`.
        activation_cap: see `search.compare.compare`.
        optimize: see `make_plan`.
        stages_per_rank: of the schedules that take any number; None: their own.

    Raises:
        PlanError: see `costs_of_cut`.
    """
    costs_of_cut(weights, (0, len(weights)), costs)
    rows = []
    for schedule, known in with_stages(stages_per_rank).items():
        try:
            placement, stages = known.on(num_ranks), known.stages_per_rank
            cap = None if activation_cap is None else int(activation_cap * placement.parts)
            make = partial(make_plan, schedule, num_ranks, num_micro, stages_per_rank=stages)
            plan_for = partial(make, optimize=optimize, activation_cap=cap)
            equal = _simulated(equal_counts(len(weights), placement.num_stages), weights, costs, plan_for)
            rows.append(CutRow(schedule, equal, best_cut(weights, placement, costs, plan_for)))
        except PlanError as error:
            rows.append(CutRow(schedule, reason=str(error)))
    return rows
