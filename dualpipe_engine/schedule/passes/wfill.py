"""Fill idle gaps with weight gradients."""

from __future__ import annotations

from collections import deque
from functools import cached_property
from itertools import chain
from math import inf
from typing import Any

import numpy as np

from ..columns import B_, F_, I_, W_, Columns, Ints, Which, make_ops
from ..op import Op
from ..plan import Plan
from ..timing.costs import CostModel
from ..timing.simulate import explain
from ..timing.times import WAITS, Inputs, Spans, Unclear


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
    return Filled(plan, costs, cap, theta).plan


class Filled:
    """A plan with W in its idle gaps, see `wfill`; made when it is asked for.

    Attributes:
        makespan: simulated, under the same costs.
        peak: the most activations that a rank holds.

    Raises:
        PlanError: the plan cannot complete.
    """

    def __init__(self, plan: Plan, costs: CostModel, cap: int | None = None, theta: float = 0.0) -> None:
        self._before = plan
        try:
            self._skeleton, self._is_left = _skeleton(plan)
            timing = Inputs(plan, costs, self._skeleton)
            self._fill = _Fill(timing, costs, inf if cap is None else cap, theta)
            self._fill.run()
        except Unclear:
            explain(plan, costs)
        self._seconds = np.concatenate([timing.seconds, timing.of_weights(costs)[::-1]])
        self.makespan, self.peak = max(self._fill.free), self._fill.peak

    @cached_property
    def plan(self) -> Plan:
        """The plan."""
        ops, skeleton = list(chain.from_iterable(self._before.programs)), self._skeleton
        kept = [ops[at] for at in np.flatnonzero(self._is_left).tolist()]
        weights: list[Op] = kept.copy()
        inputs = skeleton.only(skeleton.kind == I_)
        both = (make_ops(np.full_like(inputs.kind, kind), inputs.stage, inputs.micro) for kind in (I_, W_))
        for number, whole, weight in zip(inputs.op.tolist(), *both, strict=True):
            weights[number] = weight
            if not kept[number].parts:
                kept[number] = whole
        table = [*kept, *reversed(weights)]  # of an op at its number, of its W at `~` of that
        programs = self._fill.programs
        ranks = np.repeat(np.arange(len(programs)), [len(program) for program in programs])
        found = _with_weights(skeleton, inputs, self._numbers, ranks)
        return self._before.with_ops(map(table.__getitem__, chain.from_iterable(programs)), found)

    @cached_property
    def spans(self) -> Spans:
        """When its ops run."""
        starts = np.fromiter(chain.from_iterable(self._fill.starts), np.float64)
        return Spans(starts, starts + self._seconds[self._numbers])

    @cached_property
    def _numbers(self) -> Ints:
        """Of the ops of all ranks, see `_Fill.programs`."""
        return np.fromiter(chain.from_iterable(self._fill.programs), np.int64)


def _with_weights(skeleton: Columns, inputs: Columns, numbers: Ints, ranks: Ints) -> Columns:
    """The columns of ops that are given by number, see `_Fill.programs`.

    Args:
        skeleton: all ops but the W.
        inputs: those of `skeleton` that are I.
        numbers: of the ops of all ranks.
        ranks: of each its rank.
    """
    first = np.flatnonzero(np.diff(skeleton.op, prepend=-1))
    begins, width = np.append(first, first[::-1]), np.ones(2 * len(first), np.int64)
    width[: len(first)] = np.diff(first, append=len(skeleton.op))
    begins[~inputs.op] = len(skeleton.op) + np.arange(len(inputs.op))
    widths = width[numbers]
    entry = np.repeat(begins[numbers] + widths - np.cumsum(widths), widths) + np.arange(widths.sum())
    kind = np.append(skeleton.kind, np.full_like(inputs.kind, W_))[entry]
    stage, micro = (
        np.append(*each)[entry] for each in ((skeleton.stage, inputs.stage), (skeleton.micro, inputs.micro))
    )
    return Columns(kind, stage, micro, np.repeat(ranks, widths), np.repeat(np.arange(len(numbers)), widths))


def _skeleton(plan: Plan) -> tuple[Columns, Which]:
    """A plan without its W, and I in the place of B outside pairs; and which ops of the plan these are."""
    kind, stage, micro, rank, op = plan.columns
    alone = np.bincount(op, minlength=plan.num_ops)[op] == 1
    left = kind != W_
    stays = np.zeros(plan.num_ops, bool)
    stays[op[left]] = True
    kinds = np.where((kind == B_) & alone, I_, kind)
    return Columns(kinds[left], stage[left], micro[left], rank[left], (np.cumsum(stays) - 1)[op[left]]), stays


class _Fill:
    """The ranks against the clock.

    Attributes:
        programs: for each rank what it runs: the numbers of ops, and `~` of the number of an I for its W.
        starts: when each of these starts.
        free: when each rank is through.
        peak: most activations of a rank.
    """

    def __init__(self, inputs: Inputs, costs: CostModel, cap: float, theta: float) -> None:
        forward = inputs.ops.kind[inputs.first] == F_
        frees = np.zeros(len(forward), np.int64)
        frees[inputs.ops.op[inputs.ops.kind == B_]] = 1
        weights = inputs.of_weights(costs)
        self._weights, self._late = weights.tolist(), (weights * (1 - theta)).tolist()
        self._ready = inputs.ready()
        rows = inputs.rows(
            np.arange(len(forward)), weights >= 0, np.where(forward, cap, inf), forward.astype(np.int64), frees
        )
        self._rows = list(map(iter, rows))
        self._runnable = list(range(len(rows)))
        self.programs: list[list[int]] = [[] for _ in rows]
        self.starts: list[list[float]] = [[] for _ in rows]
        self.free, self.peak = [0.0] * len(rows), 0
        self._alive = [0] * len(rows)
        self._held: list[tuple[Any, ...]] = [()] * len(rows)
        self._queues: list[deque[int]] = [deque() for _ in rows]

    def run(self) -> None:
        """Run all ops.

        Raises:
            Unclear: they do not complete.
        """
        left = len(self._rows)
        while self._runnable:
            left -= self._go_on(self._runnable.pop())
        if left:
            raise Unclear
        for rank, queue in enumerate(self._queues):
            for number in queue:
                self.starts[rank].append(self.free[rank])
                self.free[rank] += self._weights[number]
                self.programs[rank].append(~number)

    def _go_on(self, rank: int) -> bool:
        """Run a rank until it waits; whether it is through."""
        ready, queue, program = self._ready, self._queues[rank], self.programs[rank]
        now, alive, peak, through = self.free[rank], self._alive[rank], self.peak, False
        started = self.starts[rank].append
        for row in chain(self._held[rank], self._rows[rank]):
            need, hop, make, need_2, hop_2, make_2, seconds, number, queues, room, forward, frees = row
            arrival = ready[need]
            if arrival < 0:
                ready[need], self._held[rank] = WAITS - rank, (row,)
                break
            arrival += hop
            if make_2:
                other = ready[need_2]
                if other < 0:
                    ready[need_2], self._held[rank] = WAITS - rank, (row,)
                    break
                if other + hop_2 > arrival:
                    arrival = other + hop_2
            while queue and (now + self._late[queue[0]] <= arrival or alive >= room):
                done = queue.popleft()
                program.append(~done)
                started(now)
                now += self._weights[done]
                alive -= 1
            program.append(number)
            alive += forward
            if alive > peak:
                peak = alive
            alive -= frees
            if queues:
                queue.append(number)
            if arrival > now:
                now = arrival
            started(now)
            now += seconds
            waiter = ready[make]
            if waiter <= WAITS:
                self._runnable.append(WAITS - int(waiter))
            ready[make] = now
            if make_2:
                waiter = ready[make_2]
                if waiter <= WAITS:
                    self._runnable.append(WAITS - int(waiter))
                ready[make_2] = now
        else:
            through = True
        self.free[rank], self._alive[rank], self.peak = now, alive, peak
        return through
