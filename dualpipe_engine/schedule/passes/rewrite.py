"""Rewrite plans: split and make pairs, fill idle gaps with weight gradients, fuse and join backwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from ..op import FB, B, F, I, Op, W, atoms, pair
from ..plan import Plan
from ..timeline import Span
from ..timing.costs import CostModel
from ..timing.simulate import Clocks, simulate


def unpair(plan: Plan, last: int | None = None) -> Plan:
    """Split pairs into their forward, then their backward: the last `last` of every rank, None: all.

    A pair delays the forward's output until the backward is done too: where both do not overlap, pairs do harm. Where
    they overlap they still do at the end, when the whole batch waits for the last forwards to come back as gradients.
    """

    def split(program: tuple[Op, ...]) -> Iterator[Op]:
        kept = 0 if last is None else sum(op.kind == FB for op in program) - last
        for op in program:
            kept -= op.kind == FB
            yield from (op,) if kept >= 0 else atoms(op)

    return _rewrite(plan, split)


def pair_up(plan: Plan, costs: CostModel) -> Plan:
    """Make a pair of every forward and full backward of another stage that stand next to each other and need not wait.

    Where pairs overlap well, the time that one saves outweighs that the forward's output comes later. DualPipe's order
    runs the first steady round of the middle ranks unpaired.

    Only a backward whose inputs arrive before its forward would end gets into a pair. So whatever a pair waits for ends
    before its forward would, whatever waits for a pair starts after that, and the plan still completes.

    Raises:
        PlanError: the plan cannot complete.
    """
    arrivals: list[list[float]] = [[] for _ in plan.programs]
    clocks = Clocks(plan.placement, plan.num_micro, costs)
    clocks.run(plan.programs, before=lambda rank, op, arrival: arrivals[rank].append(arrival))
    programs = []
    for spans, times in zip(clocks.spans, arrivals, strict=True):
        ops: list[Op] = []
        end = 0.0
        for span, arrival in zip(spans, times, strict=True):
            op, last = span.op, ops[-1] if ops else span.op
            if op.kind == B and last.kind == F and last.stage != op.stage and arrival < end:
                ops[-1] = pair(last, op)
            else:
                ops.append(op)
            end = span.end
        programs.append(tuple(ops))
    return replace(plan, programs=tuple(programs))


def join(plan: Plan) -> Plan:
    """The plan for a model that cannot split its backward: a full B in the place of every I, and no W."""

    def whole(op: Op) -> Op:
        if op.kind == FB:
            return pair(op.parts[0], whole(op.parts[1]))
        return Op(B, op.stage, op.micro) if op.kind == I else op

    return _rewrite(plan, lambda program: (whole(op) for op in program if op.kind != W))


class Timed(NamedTuple):
    """A plan and its simulated makespan."""

    plan: Plan
    makespan: float


def wfill(plan: Plan, costs: CostModel, cap: int | None = None, theta: float = 0.0) -> Plan:
    """Keep the order of forwards and backwards, and place the W anew: into idle gaps, first in, first out.

    Every backward outside a pair runs as I and queues its W. Before an op, queued W run while they end before the op's
    inputs arrive, or where the op would hold more than `cap` activations. What is left runs at the end.

    Args:
        plan: compute ops; its own W are dropped first.
        costs: costs of the stages, which say where gaps are.
        cap: activations (stage, micro-batch) that a rank should hold at most; None: no limit. A plan that holds more
            between F and I alone still does so.
        theta: part of a W, 0..1, that may run late and delay the op.

    Raises:
        PlanError: the plan cannot complete.
    """
    return timed_wfill(plan, costs, cap, theta).plan


def timed_wfill(plan: Plan, costs: CostModel, cap: int | None = None, theta: float = 0.0) -> Timed:
    """`wfill`, with the makespan under the same costs."""

    def split(program: Iterable[Op]) -> Iterable[Op]:
        return (Op(I, op.stage, op.micro) if op.kind == B else op for op in program if op.kind != W)

    skeleton = _rewrite(plan, split)
    clocks = Clocks(plan.placement, plan.num_micro, costs, keep=False)
    done: list[list[Op]] = [[] for _ in plan.programs]
    pending: list[deque[Op]] = [deque() for _ in plan.programs]
    alive = [0] * len(plan.programs)

    def drain(rank: int, op: Op, arrival: float) -> None:
        queue = pending[rank]
        forward = op.kind in (F, FB)
        while queue:
            fits = clocks.now[rank] + costs.duration(queue[0]) * (1 - theta) <= arrival
            full = forward and cap is not None and alive[rank] >= cap
            if not (fits or full):
                break
            done[rank].append(queue[0])
            clocks.issue(rank, queue.popleft())
            alive[rank] -= 1
        done[rank].append(op)
        alive[rank] += forward
        for part in atoms(op):
            if part.kind == I:
                queue.append(Op(W, part.stage, part.micro))
            elif part.kind == B:
                alive[rank] -= 1

    clocks.run(skeleton.programs, before=drain)
    for rank, queue in enumerate(pending):
        for op in queue:
            clocks.issue(rank, op)
    programs = tuple((*ops, *queue) for ops, queue in zip(done, pending, strict=True))
    return Timed(replace(plan, programs=programs), max(clocks.now))


def safe_fuse(plan: Plan, costs: CostModel) -> Plan:
    """Make a full B of an I and its W next to it, where nobody waits for the input gradient in between.

    Under `costs` no op starts later than before: the consumer starts at or after the end of the W plus the transfer.

    Raises:
        PlanError: the plan cannot complete.
    """
    placement = plan.placement
    starts: dict[tuple[int, int], float] = {}  # of the backward of a stage and micro-batch
    spans: list[list[Span]] = [[] for _ in plan.programs]
    for span in simulate(plan, costs).spans:
        spans[span.rank].append(span)
        for part in atoms(span.op):
            if part.kind in (B, I):
                starts[part.stage, part.micro] = span.start

    def may_fuse(rank: int, op: Op, end: float) -> bool:
        consumer = (op.stage - 1, op.micro)
        if consumer not in starts:
            return True
        hop = costs.comm if placement.rank_of(*consumer) != rank else 0.0
        return end + hop <= starts[consumer]

    programs = []
    for rank, row in enumerate(spans):
        ops: list[Op] = []
        for span in row:
            op = span.op
            if op.kind == W and ops and ops[-1] == Op(I, op.stage, op.micro) and may_fuse(rank, op, span.end):
                ops[-1] = Op(B, op.stage, op.micro)
            else:
                ops.append(op)
        programs.append(tuple(ops))
    return replace(plan, programs=tuple(programs))


def _rewrite(plan: Plan, change: Callable[[tuple[Op, ...]], Iterable[Op]]) -> Plan:
    return replace(plan, programs=tuple(tuple(change(program)) for program in plan.programs))
