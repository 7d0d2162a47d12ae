"""Make plans by name, and find the best candidate of a schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import inf
from typing import NamedTuple

from ...errors import PlanError
from ..gc_paused import collector_paused
from ..orders.registry import known_schedule
from ..passes.rewrite import join, pair_up, safe_fuse, unpair
from ..passes.shorten import shorten
from ..passes.wfill import Filled
from ..plan import Plan, check_size
from ..timing.bound import plan_bound
from ..timing.costs import UNIT, CostModel
from ..timing.simulate import makespan_of, peak_activations
from ..timing.times import Spans
from .under_cap import LEAST_CAP, under_cap

THETAS = (0.0, 0.3, 0.6)  #: how much of a W may delay the next op, see `wfill`
MOST_PLANS = 8  #: plans that are shortened where transfers take time
MOST_TRIES = 4000  #: changes that are tried on each, see `shorten`, where no number is asked for
MOST_STARTS = 3_000_000  #: and the ops that all of these start, about
MANY_OPS = 20_000  #: plans with more ops try the first of THETAS and few orders, which keeps 140,000 ops within seconds


class Candidate(NamedTuple):
    """An order, as it is or with W in its gaps, and its simulated makespan where it is known."""

    order: Plan | Filled
    makespan: float | None = None

    @property
    def plan(self) -> Plan:
        return self.order if isinstance(self.order, Plan) else self.order.plan

    @property
    def spans(self) -> Spans | None:
        """When its ops run, where that is known."""
        return None if isinstance(self.order, Plan) else self.order.spans

    def held(self) -> int:
        """The most activations that a rank holds."""
        return max(peak_activations(self.order)) if isinstance(self.order, Plan) else self.order.peak


@collector_paused()
def make_plan(
    schedule: str,
    num_ranks: int,
    num_micro: int,
    costs: CostModel = UNIT,
    optimize: bool = False,
    activation_cap: int | None = None,
    split_backward: bool = True,
    stages_per_rank: int | None = None,
    tries: int | None = None,
) -> Plan:
    """Make the compute ops of a schedule.

    Args:
        schedule: one of SCHEDULES.
        num_ranks: pipeline ranks.
        num_micro: micro-batches of the batch.
        costs: costs of the stages of the schedule's own placement (2 * num_ranks stages where it is a vee);
            `CostModel.for_placement` cuts the costs of one model for each. Only `optimize` uses them.
        optimize: False: the reference order. True: of the reference order and its variants (pairs split or made, W
            moved into idle gaps) the one with the smallest simulated makespan. Where transfers take time, small
            changes make it shorter (`shorten`), unless a cap below the schedule's own holds it.
        activation_cap: activations, counted as by `peak_activations`, that no rank may exceed. None: what the reference
            order holds with many micro-batches, PP + 1 for "dualpipe". "zbv", "vhalf" and "vmin" have a plan for every
            cap from 2; with `optimize` a larger cap never makes it slower.
        split_backward: False: only full backwards, for models that cannot split them into I and W.
        stages_per_rank: stages that a rank holds, for "interleaved" and "interleaved_zb" (None: 2).
        tries: small changes that `shorten` tries on each of up to 8 orders. None: 4000 at most, within a second or
            two, and none in plans of more than `MANY_OPS`.

    Raises:
        PlanError: the name is unknown, the rank count or the stages a rank do not fit the schedule, the costs are for
            another number of stages, no plan keeps within the cap, or there is nothing for `tries` to shorten.
    """
    known = known_schedule(schedule, stages_per_rank)
    placement = known.on(num_ranks)
    check_size(placement, num_micro)
    costs.check(placement.num_stages)
    reference = known.generate(num_ranks, num_micro)
    if not split_backward:
        reference = join(reference)
    own = known.default_cap(num_ranks)
    cap = own if activation_cap is None else activation_cap
    shortens = optimize and known.splits and costs.comm > 0 and cap >= own and not known.by_cap
    if tries is not None and not (shortens and tries > 0):
        raise PlanError(
            f"tries={tries} has no effect on this plan: it is a positive number, for orders that optimize looks for "
            'where transfers take time, without a cap below the schedule\'s own; the schedules are "zb1p", '
            '"dualpipe", "dualpipev", "zbv" and "interleaved_zb"'
        )
    if not optimize and activation_cap is None:
        return reference
    if known.by_cap:
        cap = min(cap, own)
    split = split_backward and known.splits
    varied = optimize and not (known.by_cap or (known.any_cap and cap < own))
    fitting = list(_fitting(reference, costs, cap, split, varied))
    searched = known.by_cap or (known.any_cap and activation_cap is not None)
    if searched and cap >= LEAST_CAP and (optimize or not fitting):
        found = under_cap(num_ranks, num_micro, costs if optimize else UNIT, cap, split)
        fitting.append(Candidate(replace(safe_fuse(found, costs) if optimize else found, schedule=schedule)))
    if not fitting:
        smallest = LEAST_CAP if known.any_cap else _smallest_cap(reference, costs, optimize, split)
        raise PlanError(
            f"{schedule} on {num_ranks} ranks with {num_micro} micro-batches holds more than activation_cap = {cap} "
            f"activations on some rank: the smallest cap that works is {smallest}"
        )
    if shortens:
        if activation_cap is None:
            return _shortened(fitting, costs, cap, split_backward, tries)
        # More memory than it takes by itself makes it no slower.
        own_way = make_plan(schedule, num_ranks, num_micro, costs, True, None, split_backward, stages_per_rank, tries)
        fitting.append(Candidate(own_way))
    if len(fitting) == 1:
        return fitting[0].plan
    fastest = _fastest(fitting, costs)
    return fastest.plan if fastest.plan is reference else safe_fuse(fastest.plan, costs, fastest.spans)


def _shortened(fitting: Iterable[Candidate], costs: CostModel, cap: int, split: bool, tries: int | None) -> Plan:
    """The shortest plan that small changes make of the fastest candidates; the larger these, the fewer are tried.

    With transfers the order of a schedule is not the best one: each gap is too short for what the order has for it.
    """
    of_makespan: dict[float, Candidate] = {}
    for each in fitting:
        of_makespan.setdefault(each.makespan or makespan_of(each.plan, costs), each)
    ranked = sorted(of_makespan.items())
    makespan, plan = ranked[0][0], safe_fuse(ranked[0][1].plan, costs)
    if (tries is None and plan.num_ops > MANY_OPS) or makespan <= plan_bound(plan, costs, cap):
        return plan
    ops = plan.num_ops // plan.placement.num_directions  # those of one direction, which the other mirrors
    starts = MOST_PLANS
    if tries is None:
        tries = min(MOST_TRIES, MOST_STARTS // ops)
        starts = min(starts, MOST_STARTS // (tries * ops))
    others = (shorten(safe_fuse(start.plan, costs), costs, cap, tries, split) for _, start in ranked[:starts])
    return safe_fuse(_fastest(map(Candidate, others), costs).plan, costs)


def _fastest(plans: Iterable[Candidate], costs: CostModel) -> Candidate:
    """The first of those with the smallest makespan."""
    return min(plans, key=lambda each: makespan_of(each.plan, costs) if each.makespan is None else each.makespan)


def _smallest_cap(reference: Plan, costs: CostModel, optimize: bool, split: bool) -> int:
    tight = _candidates(reference, costs, 1, split) if optimize else [Candidate(reference)]
    return min(each.held() for each in tight)


def _fitting(reference: Plan, costs: CostModel, cap: int, split: bool, varied: bool) -> Iterator[Candidate]:
    """The variants that keep within a cap: all, or those up to the second or a later one that no plan can beat."""
    if not varied:
        if max(peak_activations(reference)) <= cap:
            yield Candidate(reference)
        return
    bound, found = plan_bound(reference, costs), 0
    best = inf
    for each in _candidates(reference, costs, cap, split):
        if each.held() > cap:
            continue
        makespan = makespan_of(each.plan, costs) if each.makespan is None else each.makespan
        yield each._replace(makespan=makespan)
        best, found = min(best, makespan), found + 1
        if found > 1 and best <= bound:
            return


def _candidates(reference: Plan, costs: CostModel, cap: int, split: bool) -> Iterator[Candidate]:
    """Variants, with the makespan and the activations of those that have been simulated."""
    thetas = (THETAS[:1] if reference.num_ops > MANY_OPS else THETAS) if split else ()
    yield Candidate(reference)
    for order in _orders(reference, costs):
        for theta in thetas:
            filled = Filled(order, costs, cap, theta)
            yield Candidate(filled, filled.makespan)
        if order != reference:
            yield Candidate(order)


def _orders(reference: Plan, costs: CostModel) -> Iterator[Plan]:
    """The reference and its variants: without pairs, with more pairs in the warm-up, and with up to PP/2 pairs fewer in
    the cool-down of each rank (the larger the plan, the fewer of these are tried).

    Of equals the first is taken. The order without pairs comes before those with some: its forwards do not wait for
    backwards, so that a late op delays less.
    """
    known: list[Plan] = []

    def fresh(order: Plan) -> Iterator[Plan]:
        if order not in known:
            known.append(order)
            yield order

    yield from fresh(reference)
    yield from fresh(unpair(reference))
    bases = reference, pair_up(reference, costs)
    yield from fresh(bases[1])
    most = min(reference.placement.num_stages // 2, MANY_OPS // reference.num_ops)
    for base in bases:
        for last in range(1, most + 1):
            yield from fresh(unpair(base, last))
