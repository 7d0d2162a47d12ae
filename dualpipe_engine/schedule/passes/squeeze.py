"""Squeeze an order: every op as early as the order and a cap on activations allow, W in between (arXiv 2405.15362)."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from heapq import heappop, heappush
from itertools import pairwise
from math import inf
from typing import NamedTuple

from ..op import B, F, I, Op, W
from ..placement import Placement
from ..plan import Plan
from ..timing.costs import CostModel


class Way(NamedTuple):
    """How idle time is used.

    Args:
        pull: whether ops further down the order may run where the next one has to wait.
        theta: part of a W, 0..1, that may run late and delay the next op.
    """

    pull: bool = True
    theta: float = 0.0


EAGER = Way()


class Squeezed(NamedTuple):
    """A plan and its simulated makespan."""

    plan: Plan
    makespan: float


class Squeezer:
    """An order under the costs of the stages of its placement, to be squeezed under one cap or another.

    Args:
        plan: F and I only, those of a stage in order of micro-batches, all of one direction; it completes.
        costs: costs of the stages of the placement.
        split: False: full backwards in the place of I, and no W.
    """

    def __init__(self, plan: Plan, costs: CostModel, split: bool = True) -> None:
        costs.check(plan.placement.num_stages)
        self.plan, self.steps = plan, _Steps(plan.placement, plan.num_micro, costs, split)
        self.orders = [[self.steps.number(op) for op in program] for program in plan.programs]
        self.place = {op: at for order in self.orders for at, op in enumerate(order)}

    def run(self, cap: int, way: Way = EAGER, limit: float = inf) -> Squeezed | None:
        """Run the order against a clock and write down what each rank does.

        A rank runs the next op of its order once its inputs are there. Until then it runs one that is ready further
        down and ends before: those that free memory first, and a forward only where all forwards that it overtakes
        still fit under the cap. Failing that, it runs the W that waits longest. A forward that would exceed the cap has
        a W run before it.

        The plan completes, since of the ops that are left the one that comes first has its inputs and, once W have run,
        room under the cap.

        Args:
            cap: activations (stage, micro-batch) that a rank may hold, at least as many as lie between F and I.
            way: how idle time is used.
            limit: None is returned as soon as the makespan is sure to be longer.
        """
        clock = _Clock(self, cap, way)
        if not clock.run(limit):
            return None
        programs = tuple(tuple(map(self.steps.op, program)) for program in clock.programs)
        return Squeezed(replace(self.plan, programs=programs), max(clock.free))


class _Steps:
    """The way of a micro-batch in 2 S steps: F of stages 0..S-1, then I of stages S-1..0.

    An op is the number `step * M + micro`, so that of the next step is M more; a W is `~` of its I.
    """

    def __init__(self, placement: Placement, num_micro: int, costs: CostModel, split: bool) -> None:
        num_stages = placement.num_stages
        self.num_micro, self.split = num_micro, split
        self.forwards = num_stages * num_micro  # ops below this are F
        self.stages = [*range(num_stages), *reversed(range(num_stages))]
        each = [costs.at(stage) for stage in self.stages]
        self.seconds = [f for f, _, _, _ in each[:num_stages]]
        self.seconds += [i if split else i + w for _, i, w, _ in each[num_stages:]]
        self.weights = [w for _, _, w, _ in each]
        self.ranks = [placement.rank(stage) for stage in self.stages]
        self.hops = [costs.comm if here != there else 0.0 for here, there in pairwise(self.ranks)]
        #: Steps of each rank, those that free memory first.
        self.of_rank: list[list[int]] = [[] for _ in range(placement.num_ranks)]
        self.work = [0.0] * placement.num_ranks  # seconds of each rank
        for step in reversed(range(2 * num_stages)):
            rank = self.ranks[step]
            self.of_rank[rank].append(step)
            self.work[rank] += num_micro * (
                self.seconds[step] + (self.weights[step] if split and step >= num_stages else 0)
            )

    def number(self, op: Op) -> int:
        step = op.stage if op.kind == F else len(self.stages) - 1 - op.stage
        return step * self.num_micro + op.micro

    def op(self, number: int) -> Op:
        step, micro = divmod(number if number >= 0 else ~number, self.num_micro)
        kind = W if number < 0 else F if number < self.forwards else I if self.split else B
        return Op(kind, self.stages[step], micro)


class _Clock:
    """The ranks against the clock."""

    def __init__(self, order: Squeezer, cap: int, way: Way) -> None:
        self.steps, self.orders, self.place, self.cap, self.way = order.steps, order.orders, order.place, cap, way
        steps, num_micro, ranks = order.steps, order.plan.num_micro, range(len(order.orders))
        self.ran = [0] * len(steps.stages)  # micro-batches that are through each step
        self.arrivals = [0.0] * num_micro + [inf] * ((len(steps.stages) - 1) * num_micro)
        self.at = [0 for _ in ranks]  # what is before this place of the order has run
        self.free = [0.0 for _ in ranks]  # when the rank has finished what it runs
        self.alive = [0 for _ in ranks]  # activations
        self.held = [0 for _ in ranks]  # those of them between F and I
        self.waiting: list[deque[int]] = [deque() for _ in ranks]  # I whose W is left
        self.left = list(steps.work)
        self.programs: list[list[int]] = [[] for _ in ranks]
        self.events = [(0.0, rank) for rank in ranks]

    def run(self, limit: float) -> bool:
        """Run all ops; False: it takes longer than `limit`."""
        limit *= 1 + 1e-12  # `left` is summed up in another order than the clock
        while self.events:
            now, rank = heappop(self.events)
            if self.free[rank] > now:
                continue
            op = self._choose(rank, now)
            if op is not None and self._issue(rank, op, now) + self.left[rank] > limit:
                return False
        return True

    def _choose(self, rank: int, now: float) -> int | None:
        """What a free rank runs; None: it waits for what arrives next."""
        order, at, waiting = self.orders[rank], self.at[rank], self.waiting[rank]
        while at < len(order) and self._has_run(order[at]):
            at += 1
        self.at[rank] = at
        arrival, full = inf, False
        if at < len(order):
            op = order[at]
            arrival = self.arrivals[op]
            full = op < self.steps.forwards and self.alive[rank] >= self.cap
            if arrival <= now:
                return ~waiting[0] if full else op
            if self.way.pull:
                overtaking = self._overtaking(rank, now, arrival)
                if overtaking is not None:
                    return overtaking
        if waiting:
            late = self.steps.weights[waiting[0] // self.steps.num_micro] * (1 - self.way.theta)
            if full or now + late <= arrival:
                return ~waiting[0]
        return None

    def _has_run(self, op: int) -> bool:
        step, micro = divmod(op, self.steps.num_micro)
        return micro < self.ran[step]

    def _overtaking(self, rank: int, now: float, until: float) -> int | None:
        """An op further down the order that is ready and ends before `until`."""
        for step in self.steps.of_rank[rank]:
            micro = self.ran[step]
            if micro < self.steps.num_micro and now + self.steps.seconds[step] <= until:
                op = step * self.steps.num_micro + micro
                if self.arrivals[op] <= now and (op >= self.steps.forwards or self._has_room(rank, op)):
                    return op
        return None

    def _has_room(self, rank: int, forward: int) -> bool:
        """Whether a forward and all those before it in the order fit under the cap."""
        if self.alive[rank] >= self.cap:
            return False
        held = self.held[rank] + 1
        for op in self.orders[rank][self.at[rank] : self.place[forward]]:
            if not self._has_run(op):
                held += 1 if op < self.steps.forwards else -1
                if held > self.cap:
                    return False
        return True

    def _issue(self, rank: int, op: int, now: float) -> float:
        """Run an op; returns when it ends."""
        self.programs[rank].append(op)
        if op < 0:
            seconds = self.steps.weights[self.waiting[rank].popleft() // self.steps.num_micro]
            self.alive[rank] -= 1
        else:
            step = op // self.steps.num_micro
            seconds = self.steps.seconds[step]
            self.ran[step] += 1
            if op < self.steps.forwards:
                self.alive[rank] += 1
                self.held[rank] += 1
            else:
                self.held[rank] -= 1
                if self.steps.split:
                    self.waiting[rank].append(op)
                else:
                    self.alive[rank] -= 1
        end = self.free[rank] = now + seconds
        self.left[rank] -= seconds
        heappush(self.events, (end, rank))
        if op >= 0 and step < len(self.steps.hops):
            there = self.steps.ranks[step + 1]
            arrival = self.arrivals[op + self.steps.num_micro] = end + self.steps.hops[step]
            if there != rank:
                heappush(self.events, (arrival, there))
        return end
