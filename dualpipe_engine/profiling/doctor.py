"""Doctor: what of a profile costs most, and what to change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median

from ..errors import PlanError
from ..schedule.op import FB, I, atoms
from ..schedule.orders.registry import KNOWN
from ..schedule.placement import VEE, Placement
from ..schedule.search.compare import compare, fastest
from ..schedule.search.make_plan import make_plan
from ..schedule.timing.costs import CostModel
from ..schedule.timing.simulate import simulate
from .breakdown import COMMUNICATION, DATA_TIME, OPTIMIZER, OTHER, REDUCING
from .profile import Profile, RankProfile

SAME = 0.03  #: of a step; schedules that differ by less are decided by memory


@dataclass(frozen=True)
class Finding:
    """One thing that costs time or memory.

    Args:
        name: a word or two.
        cost: measured seconds of a step.
        gain: seconds of a step that the change is expected to save, negative where it saves memory only; None: not
            known.
        fact: what was measured, a sentence.
        advice: what to change, a sentence.
    """

    name: str
    cost: float
    gain: float | None
    fact: str
    advice: str


def diagnose(profile: Profile) -> list[Finding]:
    """All findings, the most expensive first; empty where nothing is wrong. Gains do not add up: one change often takes
    from the next what it could have won."""
    case = _Case(profile)
    found = [finding for check in _CHECKS if (finding := check(case)) is not None]
    return sorted(found, key=lambda finding: -finding.cost)


class _Case:
    """A profile with what several checks need."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.plan, self.costs, self.step = profile.plan, profile.costs, profile.step
        self.num_ranks = self.plan.placement.num_ranks
        self.pipeline = [rank for rank in profile.ranks if rank.replica == 0]
        self.pairs = [op for program in self.plan.programs for op in program if op.kind == FB]

    def worst(self, category: str) -> tuple[RankProfile, float]:
        """The rank that spends most on a category, and its seconds."""
        rank = max(self.profile.ranks, key=lambda rank: rank.seconds.get(category, 0.0))
        return rank, rank.seconds.get(category, 0.0)

    def share(self, seconds: float) -> str:
        return f"{seconds * 1e3:.1f} ms, {seconds / self.step:.0%} of a step"

    @cached_property
    def makespan(self) -> float:
        """Simulated with the measured costs, seconds."""
        return simulate(self.plan, self.costs).makespan

    @cached_property
    def overlap(self) -> float:
        """Time of a pair, by that of its halves in turn; 1 where no pair ran as one op."""
        if self.costs.fb is None:
            return 1.0
        costs = [self.costs.at(stage) for stage in range(self.plan.placement.num_stages)]
        return median(fb / (f + i + w) if f + i + w else 1.0 for f, i, w, fb in costs)

    @cached_property
    def cut(self) -> CostModel:
        """Costs of the model cut into as many stages as there are ranks."""
        return self.costs.joined(self.plan.placement.parts)

    @cached_property
    def slowness(self) -> dict[int, float]:
        """Index of a rank -> time of its ops by that of the fastest rank with the same stages; only ranks that share
        stages with others."""
        ranks = self.profile.ranks
        held: dict[str, list[float]] = defaultdict(list)
        for rank in ranks:
            for op, seconds in rank.ops.items():
                held[op].append(seconds)
        result = {}
        for index, rank in enumerate(ranks):
            ratios = [
                seconds / min(held[op]) for op, seconds in rank.ops.items() if len(held[op]) > 1 and min(held[op]) > 0
            ]
            if ratios:
                result[index] = median(ratios)
        return result


def _straggler(case: _Case) -> Finding | None:
    if not case.slowness:
        return None
    index = max(case.slowness, key=lambda index: case.slowness[index])
    ratio, rank = case.slowness[index], case.profile.ranks[index]
    cost = rank.compute * (1 - 1 / ratio)
    if ratio < 1.2 or cost < 0.03 * case.step:
        return None
    return Finding(
        "slow rank",
        cost,
        cost,
        f"{rank.name} on {rank.host} takes {ratio:.2f}x as long for its ops as another rank for the same stages "
        f"({case.share(cost)}).",
        "Look at this machine: other processes, clocks, temperature, memory bandwidth, core binding "
        "(--bind_cores_to_rank).",
    )


def _unbalanced(case: _Case) -> Finding | None:
    work = [sum(case.costs.duration(op) for op in program) for program in case.plan.programs]
    mean, most = fmean(work), max(work)
    if not mean or most / mean < 1.1 or case.profile.facts.get("partition_method") == "pairs":
        return None

    def even(value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        return fmean(value) if isinstance(value, tuple) else value

    costs = case.costs
    fb = None if costs.fb is None else even(costs.fb)
    gain = (
        case.makespan
        - simulate(case.plan, replace(costs, f=even(costs.f), i=even(costs.i), w=even(costs.w), fb=fb)).makespan
    )
    if gain < 0.03 * case.step:
        return None
    slow = max(range(len(work)), key=lambda rank: work[rank])
    return Finding(
        "unbalanced stages",
        most - mean,
        gain,
        f"rank {slow} computes {most * 1e3:.1f} ms, the mean of all ranks is {mean * 1e3:.1f} ms ({most / mean:.2f}x).",
        'Set "partition_method": "pairs" in the "pipeline" section, with measured "layer_costs" where layers differ in '
        "kind.",
    )


def _uneven_experts(case: _Case) -> Finding | None:
    load = case.profile.expert_load
    if load is None:
        return None
    kept = [1 - load.excess(stage) for stage in range(case.plan.placement.num_stages)]
    f, i, w, fb = zip(
        *([part * kept[stage] for part in case.costs.at(stage)] for stage in range(len(kept))), strict=True
    )
    even = replace(case.costs, f=f, i=i, w=w, fb=None if case.costs.fb is None else fb)
    saved = [sum(case.costs.duration(op) - even.duration(op) for op in program) for program in case.plan.programs]
    cost, worst = max(saved), max(load.layers, key=lambda layer: layer.busiest_rank)
    if cost < 0.03 * case.step:
        return None
    return Finding(
        "uneven experts",
        cost,
        case.makespan - simulate(case.plan, even).makespan,
        f"the ranks that share experts wait for the busiest of them for about {case.share(cost)}: in layer "
        f"{worst.layer} it has {worst.busiest_rank:.2f}x the mean of the rows, its busiest expert {worst.uneven:.2f}x.",
        'Balance the routers: a larger bias_rate or sequence_loss ("bias"), a larger weight of the auxiliary loss '
        "(router_aux_loss_coef with output_router_logits=True); or let fewer ranks share the experts.",
    )


def _few_micro_batches(case: _Case) -> Finding | None:
    plan, cost = case.plan, max(rank.bubble for rank in case.pipeline)
    if plan.schedule not in KNOWN:
        return None
    stages = plan.placement.stages_per_rank
    more = make_plan(
        plan.schedule, case.num_ranks, 2 * plan.num_micro, case.costs, optimize=True, stages_per_rank=stages
    )
    gain = case.makespan - simulate(more, case.costs).makespan / 2
    if cost < 0.15 * case.step or gain < 0.05 * case.step:
        return None
    return Finding(
        "few micro-batches",
        cost,
        gain,
        f"the idlest rank computes nothing for {case.share(cost)}, with {plan.num_micro} micro-batches on "
        f"{case.num_ranks} ranks (the gain is for the same number of samples).",
        f'Set "gradient_accumulation_steps": {2 * plan.num_micro}, with smaller micro-batches where the batch size '
        "must stay.",
    )


def _overlap(case: _Case) -> Finding | None:
    if case.plan.schedule != "dualpipe" or case.overlap < 0.95:
        return None
    other = make_plan("dualpipev", case.num_ranks, case.plan.num_micro, _halved(case), optimize=True)
    gain = case.makespan - simulate(other, _halved(case)).makespan
    if gain < -SAME * case.step:
        return None
    return Finding(
        "overlap not effective",
        max(0.0, gain),
        gain,
        f"a pair of forward and backward takes {case.overlap:.0%} of the two in turn, so DualPipe's second copy of the "
        f"parameters buys little: simulated with the measured costs it takes {case.makespan * 1e3:.1f} ms, DualPipeV "
        f"{(case.makespan - gain) * 1e3:.1f} ms.",
        'Set "schedule": "dualpipev", which holds half the parameters; or give the layers phases(), so that pairs '
        "overlap.",
    )


def _halved(case: _Case) -> CostModel:
    return case.cut.for_placement(Placement(VEE, case.num_ranks))


def _other_schedule(case: _Case) -> Finding | None:
    split = case.profile.facts.get("weight_split") != 0
    stages = case.plan.placement.stages_per_rank
    rows = compare(case.num_ranks, case.plan.num_micro, case.cut, split_backward=split, stages_per_rank=stages)
    first = fastest(rows)
    # A second copy of the parameters must be worth it, as `_overlap` has it for those who run one.
    near = [row for row in rows if first is not None and row.total <= first.total + SAME * case.step]
    best = min(near, key=lambda row: (row.parameter_copies, row.total), default=None)
    if best is None or best.schedule == case.plan.schedule or case.makespan - best.makespan < 0.05 * case.step:
        return None
    if best.schedule == "dualpipev" and _overlap(case) is not None:
        return None
    return Finding(
        "another schedule is faster",
        max(rank.bubble for rank in case.pipeline),
        case.makespan - best.makespan,
        f"with the measured costs {case.plan.schedule} takes {case.makespan * 1e3:.1f} ms, {best.schedule} "
        f"{best.makespan * 1e3:.1f} ms in simulation ({best.parameter_copies}x parameters).",
        f'Set "schedule": "{best.schedule}" in the "pipeline" section, or "auto" to measure and choose.',
    )


def _exposed_communication(case: _Case) -> Finding | None:
    rank, cost = case.worst(COMMUNICATION)
    if cost < 0.03 * case.step:
        return None
    hidden = rank.hidden.get(COMMUNICATION, 0.0)
    if case.overlap < 0.95:
        advice = "Use larger micro-batches or send less (bf16 activations); pairs overlap already."
    elif case.pairs:
        advice = (
            'Let pairs hide it: layers with phases() and "overlap": "auto"; larger micro-batches; bf16 activations.'
        )
    else:
        advice = (
            "Use larger micro-batches or bf16 activations, and a schedule with one stage a rank (with more of them "
            'micro-batches are sent more often); layers with phases() hide their own transfers under "dualpipe" and '
            '"dualpipev".'
        )
    gain = case.makespan - simulate(case.plan, replace(case.costs, comm=0.0)).makespan
    return Finding(
        "exposed communication",
        cost,
        min(cost, gain) if gain > 0 else cost,
        f"{rank.name} stands still for transfers under way for {case.share(cost)}; {hidden * 1e3:.1f} ms are hidden.",
        advice,
    )


def _connections(case: _Case) -> Finding | None:
    facts = case.profile.facts
    text = (facts.get("environment") or {}).get("CUDA_DEVICE_MAX_CONNECTIONS")
    _, transfers = case.worst(COMMUNICATION)
    _, reduction = case.worst(REDUCING)
    cost = transfers + reduction
    if facts.get("device") != "cuda" or not str(text or "").isdigit() or int(str(text)) >= 8 or cost < 0.01 * case.step:
        return None
    return Finding(
        "few hardware queues",
        cost,
        None,
        f"CUDA_DEVICE_MAX_CONNECTIONS is {text}, so communication can queue behind computation; {case.share(cost)} of "
        "communication and reduction are exposed.",
        "Unset CUDA_DEVICE_MAX_CONNECTIONS, or set it to 8 or more.",
    )


def _exposed_reduction(case: _Case) -> Finding | None:
    rank, cost = case.worst(REDUCING)
    if cost < 0.05 * case.step:
        return None
    if case.profile.facts.get("zero_stage") == 2:
        advice = "Use ZeRO stage 1 where memory allows: stage 2 reduces after every micro-batch."
    else:
        advice = (
            'Reduce in bf16 ("communication_data_type": "bf16") or take more micro-batches, so that a step has fewer '
            "reductions."
        )
    return Finding(
        "reduction not hidden",
        cost,
        cost,
        f"{rank.name} starts or waits for gradient reductions for {case.share(cost)}; "
        f"{rank.hidden.get(REDUCING, 0.0) * 1e3:.1f} ms are hidden.",
        advice,
    )


def _optimizer(case: _Case) -> Finding | None:
    rank, cost = case.worst(OPTIMIZER)
    copies = case.plan.placement.num_directions * int(case.profile.facts.get("replicas") or 1)
    if cost < 0.1 * case.step:
        return None
    if copies > 1 and case.profile.facts.get("zero_stage") == 0:
        gain, advice = cost * (1 - 1 / copies), f"Set ZeRO stage 1: {copies} ranks share the step of each stage."
    else:
        gain, advice = None, "Use a fused optimizer, or more micro-batches a step."
    return Finding("optimizer", cost, gain, f"the optimizer of {rank.name} takes {case.share(cost)}.", advice)


def _split(case: _Case) -> Finding | None:
    share = case.profile.facts.get("weight_split")
    splits = any(part.kind == I for program in case.plan.programs for op in program for part in atoms(op))
    if share is None or share >= 0.5 or not splits:
        return None
    costs = case.costs
    stages = [costs.at(stage) for stage in range(case.plan.placement.num_stages)]
    halves = tuple((i + w) / 2 for _, i, w, _ in stages)
    gain = case.makespan - simulate(case.plan, replace(costs, i=halves, w=halves)).makespan
    if gain < 0.02 * case.step:
        return None
    return Finding(
        "weight gradients not split off",
        max(rank.bubble for rank in case.pipeline),
        gain,
        f"only {share:.0%} of the weights have their gradient in W, so I is long and W fills little of the bubble.",
        "See the log after the first batch for the layers that are not split; a layer of your own that has an "
        "attribute `weight_grad_store` gets the store for its weight gradients there.",
    )


def _data(case: _Case) -> Finding | None:
    rank, cost = case.worst(DATA_TIME)
    if cost < 0.03 * case.step:
        return None
    return Finding(
        "data",
        cost,
        cost,
        f"{rank.name} reads inputs and labels for {case.share(cost)}.",
        "Prepare batches ahead: more workers in the data loader, pinned memory.",
    )


def _engine_time(case: _Case) -> Finding | None:
    rank, cost = case.worst(OTHER)
    if cost < 0.1 * case.step:
        return None
    return Finding(
        "small ops",
        cost,
        None,
        f"{rank.name} spends {case.share(cost)} between its ops.",
        "Use larger micro-batches: the time between ops does not grow with them.",
    )


def _unsteady(case: _Case) -> Finding | None:
    typical = median(case.profile.steps)
    cost = fmean(case.profile.steps) - typical
    longest = max(case.profile.steps)
    if longest < 1.5 * typical or cost < 0.03 * typical:
        return None
    return Finding(
        "unsteady steps",
        cost,
        cost,
        f"the longest of {len(case.profile.steps)} steps takes {longest / typical:.1f}x the median "
        f"({typical * 1e3:.1f} ms).",
        "Look for what runs now and then: checkpoints, evaluation, logging, the data loader, first steps (leave them "
        "out), other processes on the machine.",
    )


def _guarded(check: Callable[[_Case], Finding | None]) -> Callable[[_Case], Finding | None]:
    """A check that simulates a plan which cannot be made here has nothing to say."""

    def run(case: _Case) -> Finding | None:
        try:
            return check(case)
        except PlanError:
            return None

    return run


_CHECKS = [
    _straggler,
    _guarded(_unbalanced),
    _guarded(_uneven_experts),
    _guarded(_few_micro_batches),
    _guarded(_overlap),
    _guarded(_other_schedule),
    _exposed_communication,
    _connections,
    _exposed_reduction,
    _optimizer,
    _split,
    _data,
    _engine_time,
    _unsteady,
]
