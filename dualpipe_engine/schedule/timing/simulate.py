"""Run a plan against a clock: when each op starts and ends under a cost model, and how much memory it holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise, repeat
from operator import itemgetter
from typing import NoReturn

from ...errors import PlanError
from ..gc_paused import collector_paused
from ..op import COPIES, FB, GRADIENTS, OFFLOAD, RELOAD, STEPS, B, F, I, Op, W, atoms
from ..placement import Placement
from ..plan import Plan
from ..timeline import Span, Timeline
from ..walk import walk
from .copies import CopyStreams
from .costs import CostModel
from .times import Times, Unclear, times_of

__all__ = ["Clocks", "CostModel", "makespan_of", "peak_activations", "peak_bytes", "simulate"]

_NEVER = -1.0
_TAKES = frozenset((F, FB, RELOAD))  #: what needs room for an activation
_LETS_GO = GRADIENTS | {OFFLOAD}


class Clocks:
    """The ranks of one pipeline, each with a clock; an op starts when its rank is free and its inputs have arrived.

    Sends do not occupy a rank: a result arrives `comm` seconds after its op has ended, at once on the same rank.

    Args:
        placement: where stages live.
        num_micro: micro-batches of the batch.
        costs: costs of the stages of `placement`.

    Attributes:
        now: when each rank is free.
        spans: what each rank has run, in order.

    Raises:
        PlanError: the costs are for another number of stages.
    """

    def __init__(self, placement: Placement, num_micro: int, costs: CostModel) -> None:
        costs.check(placement.num_stages)
        num_stages = placement.num_stages
        self.placement, self.num_micro, self.costs = placement, num_micro, costs
        self.now = [0.0] * placement.num_ranks
        self.spans: list[list[Span]] = [[] for _ in range(placement.num_ranks)]
        # When each result was there, by its key: the batch and the outputs of stages 0.., num_micro each, then the
        # input gradients of stages 0.. and the gradient of the loss.
        self._grad = (num_stages + 1) * num_micro
        given, computed = [0.0] * num_micro, [_NEVER] * (num_stages * num_micro)
        self._ready = given + computed + computed + given
        ranks = [placement.rank(stage) for stage in range(num_stages)]
        hops = [costs.comm if a != b else 0.0 for a, b in pairwise(ranks)]
        self._hop = [0.0, *hops, 0.0]  # seconds from stage - 1 to stage, or back
        self._durations: dict[tuple[str, int, int, str], float] = {}
        self._copies: CopyStreams | None = None

    def run(self, programs: Sequence[Sequence[Op]]) -> None:
        """Run programs of compute ops and copies, one a rank.

        Args:
            programs: the ops of each rank, in order.

        Raises:
            PlanError: an op has a stage or micro-batch that the plan does not have, or the programs cannot complete;
                the text names rank, op and missing input.
        """
        self._check_range(programs)
        if any(op.kind in COPIES for program in programs for op in program):
            self._copies = CopyStreams(programs, self.costs)

        def attempt(rank: int, position: int) -> int | list[int]:
            op = programs[rank][position]
            if op.kind in COPIES:
                return self._copy(rank, op)
            arrival = self._arrival(op)
            if arrival < 0:
                return ~int(arrival)
            if self._copies is not None and op.kind not in (F, W):
                arrival = max(arrival, self._copies.back(op))
            return self.issue(rank, op, arrival)

        at, waiting = walk(programs, attempt)
        if waiting:
            rank, key = min((min(ranks), key) for key, ranks in waiting.items())
            raise PlanError(self._deadlock(programs, at, rank, key))

    def issue(self, rank: int, op: Op, arrival: float = 0.0) -> list[int]:
        """Run `op` once `rank` is free and time `arrival` has come; returns the keys of its results."""
        kind, stage, micro, parts = op
        shape = (kind, stage, parts[1].stage, parts[1].kind) if parts else (kind, stage, 0, "")
        duration = self._durations.get(shape)
        if duration is None:
            duration = self._durations[shape] = self.costs.duration(op)
        start = self.now[rank]
        if arrival > start:
            start = arrival
        end = self.now[rank] = start + duration
        self.spans[rank].append(Span(rank, op, start, end))
        if self._copies is not None:
            self._copies.computed(rank, op, end)
        results = []
        for kind, stage, micro, _ in parts or (op,):
            if kind != W:
                key = stage * self.num_micro + micro + (self.num_micro if kind == F else self._grad)
                self._ready[key] = end
                results.append(key)
        return results

    def _copy(self, rank: int, op: Op) -> list[int]:
        assert self._copies is not None
        span, self.now[rank] = self._copies.step(rank, op, self.now[rank])
        self.spans[rank].append(span)
        return []

    def _arrival(self, op: Op) -> float:
        """When the last input of `op` arrives; `~key` (negative) of one that has not been computed yet."""
        num_micro, ready, latest = self.num_micro, self._ready, 0.0
        for kind, stage, micro, _ in op.parts or (op,):
            key, hop = stage * num_micro + micro, self._hop[stage]
            if kind == W:
                key, hop = key + self._grad, 0.0
            elif kind != F:
                if ready[key + num_micro] < 0:  # the rank's own forward
                    return ~(key + num_micro)
                key, hop = key + num_micro + self._grad, self._hop[stage + 1]
            time = ready[key]
            if time < 0:
                return ~key
            if time + hop > latest:
                latest = time + hop
        return latest

    def _check_range(self, programs: Sequence[Sequence[Op]]) -> None:
        num_stages, num_micro = self.placement.num_stages, self.num_micro
        for rank, program in enumerate(programs):
            for op in program:
                for _, stage, micro, _ in op.parts or (op,):
                    if stage >= num_stages or micro >= num_micro:
                        raise PlanError(
                            f"rank {rank} cannot run {op}: there are {num_stages} stages and {num_micro} micro-batches"
                        )

    def _deadlock(self, programs: Sequence[Sequence[Op]], at: Sequence[int], rank: int, key: int) -> str:
        """Say what `rank` waits for, and why it does not come."""
        gradient, index = key >= self._grad, key % self._grad
        stage, micro = divmod(index - (0 if gradient else self.num_micro), self.num_micro)
        kinds = (B, I) if gradient else (F,)
        result = f"the {'input gradient' if gradient else 'output'} of stage {stage} for micro-batch {micro}"
        text = f"rank {rank} cannot run {programs[rank][at[rank]]} (op {at[rank]}): {result} is missing; "
        for other, program in enumerate(programs):
            for op in program[at[other] :]:
                for part in atoms(op):
                    if part.kind in kinds and part.stage == stage and part.micro == micro:
                        return text + f"rank {other} has {op} only after {program[at[other]]}, which waits as well"
        return text + f"no rank runs {' or '.join(f'{stage}{kind}{micro}' for kind in kinds)}"


@collector_paused()
def simulate(plan: Plan, costs: CostModel) -> Timeline:
    """Time every compute op and every copy to and from host memory of `plan`; transfers and tail ops are ignored.

    Raises:
        PlanError: the plan cannot complete, or the costs are for another number of stages.
    """
    plan = _steps(plan)
    try:
        times = times_of(plan, costs)
    except Unclear:
        clocks = Clocks(plan.placement, plan.num_micro, costs)
        clocks.run(plan.programs)
        return Timeline(plan.placement.num_ranks, [span for spans in clocks.spans for span in spans])
    ranks = chain.from_iterable(repeat(rank, len(program)) for rank, program in enumerate(plan.programs))
    spans = zip(ranks, chain.from_iterable(plan.programs), times.starts.tolist(), times.ends.tolist(), strict=True)
    return Timeline(plan.placement.num_ranks, list(map(tuple.__new__, repeat(Span), spans)))


@collector_paused()
def makespan_of(plan: Plan, costs: CostModel) -> float:
    """The makespan that `simulate` finds.

    Raises: see `simulate`.
    """
    try:
        return times_of(_steps(plan), costs).makespan
    except Unclear:
        return simulate(plan, costs).makespan


def timed(plan: Plan, costs: CostModel) -> Times:
    """When the ops of a plan of compute ops run.

    Raises:
        PlanError: the plan cannot complete, or breaks a rule in another way.
    """
    try:
        return times_of(plan, costs)
    except Unclear:
        explain(plan, costs)


def explain(plan: Plan, costs: CostModel) -> NoReturn:
    """Say what is wrong with a plan that cannot be timed by `times_of`."""
    simulate(plan, costs)
    raise PlanError("an op of the plan stands twice, or on a rank that is not its own: verify the plan")


def peak_activations(plan: Plan) -> list[int]:
    """For each rank the largest number of (stage, micro-batch) whose activations it holds at once.

    Held from the start of F to the end of W (or of a full B), without the time from OFFLOAD to RELOAD. On a `vee`
    placement each is half the size of one of a `linear` or `bidirectional` placement of the same model.
    """
    peaks = []
    for program in _steps(plan).programs:
        alive = peak = 0
        for kind, _, _, parts in program:
            if kind in _TAKES:
                alive += 1
                if alive > peak:
                    peak = alive
            if kind in _LETS_GO or (kind == FB and parts[1].kind == B):
                alive -= 1
        peaks.append(peak)
    return peaks


def peak_bytes(plan: Plan, costs: CostModel) -> list[int]:
    """For each rank the most bytes of activations that it holds at once.

    Raises:
        PlanError: the costs are for another number of stages.
    """
    costs.check(plan.placement.num_stages)
    sizes = _of_stages(costs.activation_bytes, plan)
    pending = sizes if costs.pending_bytes is None else _of_stages(costs.pending_bytes, plan)
    peaks = []
    for program in _steps(plan).programs:
        alive = peak = 0
        for op in program:
            parts = atoms(op)
            alive += sum(sizes[part.stage] for part in parts if part.kind in _TAKES)
            peak = max(peak, alive)
            alive -= sum(sizes[part.stage] for part in parts if part.kind in (B, OFFLOAD, I))
            alive += sum(pending[part.stage] for part in parts if part.kind == I)
            peak = max(peak, alive)
            alive -= sum(pending[part.stage] for part in parts if part.kind == W)
        peaks.append(peak)
    return peaks


def _of_stages(size: int | tuple[int, ...], plan: Plan) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,) * plan.placement.num_stages


def held_over_time(timeline: Timeline) -> list[list[tuple[float, int]]]:
    """For each rank (seconds since the first op, number of activations that it holds from then on), with a last point
    at the end of the timeline. An activation is held as `peak_activations` has it; the timeline may be a measured one.
    """
    begin = min((span.start for span in timeline.spans), default=0.0)
    changes: list[list[tuple[float, int]]] = [[] for _ in range(timeline.num_ranks)]
    for rank, op, start, end in timeline.spans:
        for part in atoms(op):
            if part.kind in _TAKES:
                changes[rank].append((start - begin, 1))
            elif part.kind in _LETS_GO:
                changes[rank].append((end - begin, -1))
    result = []
    for rank_changes in changes:
        alive, points = 0, [(0.0, 0)]
        for time, change in sorted(rank_changes, key=lambda each: each[0]):  # stable: of one time, in program order
            alive += change
            points.append((time, alive))
        result.append([*points, (timeline.makespan, alive)])
    return result


def _steps(plan: Plan) -> Plan:
    kinds = set(map(itemgetter(0), chain.from_iterable(plan.programs)))
    return plan if kinds <= STEPS else plan.unlowered()
