"""Make plans by name, and find the best candidate of a schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...errors import PlanError
from ..gc_paused import collector_paused
from ..orders.registry import known_schedule
from ..passes.rewrite import join, pair_up, safe_fuse, unpair, wfill
from ..placement import Placement
from ..plan import Plan, check_size
from ..timing.costs import UNIT, CostModel
from ..timing.simulate import peak_activations, simulate

THETAS = (0.0, 0.3, 0.6)  #: how much of a W may delay the next op, see `wfill`
MANY_OPS = 20_000  #: plans with more ops try the first of THETAS and few orders, which keeps 140,000 ops within seconds


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
    known = known_schedule(schedule)
    check_size(num_ranks, num_micro)
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
