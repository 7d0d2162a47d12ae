"""When the ops of a plan start and end, worked out on numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..columns import B_, F_, I_, W_, Columns, Ints
from ..op import B, F, I, Op, W, atoms, pair
from ..placement import Placement
from ..plan import Plan
from .costs import CostModel

Seconds = NDArray[np.float64]
Row = tuple[Any, ...]  #: an op as numbers, see `Inputs.rows`

NEVER = -1  #: of a result that has not been made
WAITS = -2  #: and below: `WAITS - rank` waits for it
_KINDS = (F, B, I, W)


class Unclear(Exception):
    """The ops are not those of a plan whose order can complete; `simulate` says why."""


class Spans(NamedTuple):
    """By the position of an op among those of all ranks, when each starts and ends."""

    starts: Seconds
    ends: Seconds


class Times(NamedTuple):
    """By the position of an op among those of all ranks.

    Args:
        starts: when each op starts.
        ends: when it ends.
        arrivals: when the last of its inputs is there; 0 for a W.
        makespan: when the last rank is through.
    """

    starts: Seconds
    ends: Seconds
    arrivals: Seconds
    makespan: float


class Inputs:
    """What each op waits for and makes: an op starts when its rank is free and its inputs have arrived.

    The results of a pipeline are numbered: the batch and the outputs of stages 0.., M each, then the input gradients of
    stages 0.. and the gradient of the loss. Behind them stands one number for what nobody waits for.

    Args:
        plan: compute ops only.
        costs: costs of the stages of its placement.
        ops: its columns, or those of what it is changed into.

    Attributes:
        ops: see above.
        first: where among the columns each op begins.
        second: where the second halves of pairs stand.
        seconds: of each op.

    Raises:
        Unclear: an op stands twice, is of no stage or micro-batch, or a rank has not run before what an op needs of it.
    """

    def __init__(self, plan: Plan, costs: CostModel, ops: Columns) -> None:
        placement, num_micro, num_stages = plan.placement, plan.num_micro, plan.placement.num_stages
        costs.check(num_stages)
        self.ops, self._num_ranks = ops, placement.num_ranks
        kind, stage, micro, _, op = ops
        _must((kind <= W_).all() and (stage >= 0).all() and (micro >= 0).all())
        _must((stage < num_stages).all() and (micro < num_micro).all())
        self._num_micro, self._size = num_micro, num_stages * num_micro
        key, grad = stage * num_micro + micro, self._size + num_micro
        self._check_order(key)
        ranks = np.array([placement.rank(stage) for stage in range(num_stages)])
        hop = np.zeros(num_stages + 1)  # from stage - 1 to stage, or back
        hop[1:-1] = np.where(ranks[1:] != ranks[:-1], costs.comm, 0.0)
        forward, weight = kind == F_, kind == W_
        self._needs = np.where(forward, key, key + num_micro + grad)
        self._hops = np.where(forward, hop[stage], hop[stage + 1])
        self._makes = np.where(forward, key + num_micro, key + grad)
        self._needs[weight], self._hops[weight], self._makes[weight] = 0, 0.0, 2 * grad
        starts = np.diff(op, prepend=-1) != 0
        self.first, self.second = np.flatnonzero(starts), np.flatnonzero(~starts)
        self.seconds = self._durations(num_stages, costs)

    def _check_order(self, key: Ints) -> None:
        """Each op stands once, I and B behind their F, and W behind its I, on the same rank."""
        kind, _, _, rank, op = self.ops
        forward, whole, inputs, weights = (kind == each for each in (F_, B_, I_, W_))
        _must(np.count_nonzero(np.bincount(key[weights]) > 1) == 0)
        for makes, then in ((forward, whole | inputs), (whole | inputs, weights)):
            places = np.flatnonzero(makes)
            made = np.full(self._size, -1)
            made[key[places]] = places
            _must(np.count_nonzero(made >= 0) == len(places))
            before, after = made[key[then]], np.flatnonzero(then)
            _must((before >= 0).all() and (op[before] < op[after]).all() and (rank[before] == rank[after]).all())

    def _durations(self, num_stages: int, costs: CostModel) -> Seconds:
        kind, stage, first, second = self.ops.kind.astype(np.int64), self.ops.stage, self.first, self.second

        def alone(code: int) -> float:
            return costs.duration(Op(_KINDS[code // num_stages], code % num_stages, 0))

        def paired(code: int) -> float:
            there, back = divmod(code // len(_KINDS), num_stages)
            return costs.duration(pair(Op(F, there, 0), Op(_KINDS[code % len(_KINDS)], back, 1)))

        seconds = _looked_up(kind[first] * num_stages + stage[first], alone)
        code = (stage[second - 1] * num_stages + stage[second]) * len(_KINDS) + kind[second]
        seconds[self.ops.op[second]] = _looked_up(code, paired)
        return seconds

    def of_weights(self, costs: CostModel) -> Seconds:
        """Seconds of the W of each op that has an I, -1 of the others."""
        seconds = np.full(len(self.first), -1.0)
        those = self.ops.kind == I_
        seconds[self.ops.op[those]] = _looked_up(self.ops.stage[those], lambda stage: costs.duration(Op(W, stage, 0)))
        return seconds

    def rows(self, *more: NDArray[np.generic]) -> list[Iterator[Row]]:
        """For each rank its ops, to be gone through once: input, hop and result of the first half, those of the second
        (result 0: there is none), seconds, and what stands in `more` for the op."""
        count, first, pairs = len(self.first), self.first, self.ops.op[self.second]
        needs, hops, makes = np.zeros(count, np.int64), np.zeros(count), np.zeros(count, np.int64)
        needs[pairs], hops[pairs] = self._needs[self.second], self._hops[self.second]
        makes[pairs] = self._makes[self.second]
        every = (self._needs[first], self._hops[first], self._makes[first], needs, hops, makes, self.seconds, *more)
        return [
            zip(*(column[begin:end].tolist() for column in every), strict=True) for begin, end in pairwise(self.cuts())
        ]

    def cuts(self) -> list[int]:
        """Where the ops of each rank begin, and the end of the last."""
        return np.searchsorted(self.ops.rank[self.first], np.arange(self._num_ranks + 1)).tolist()

    def ready(self) -> list[float]:
        """When each result is there; see `NEVER` and `WAITS` for one that is not."""
        given, computed = [0.0] * self._num_micro, [float(NEVER)] * self._size
        return [*given, *computed, *computed, *given, 0.0]


class Rows:
    """The row of any one op; see `Inputs.rows`.

    Args:
        placement: where stages live.
        num_micro: micro-batches of the batch.
        costs: costs of the stages.
    """

    def __init__(self, placement: Placement, num_micro: int, costs: CostModel) -> None:
        self._placement, self._num_micro, self._costs = placement, num_micro, costs
        self._grad = (placement.num_stages + 1) * num_micro
        self._known: dict[Op, Row] = {}

    def of(self, op: Op) -> Row:
        """The row of a compute op."""
        if op not in self._known:
            first, second = self._half(atoms(op)[0]), self._half(op.parts[1]) if op.parts else (0, 0.0, 0)
            self._known[op] = (*first, *second, self._costs.duration(op))
        return self._known[op]

    def ready(self) -> list[float]:
        """See `Inputs.ready`."""
        given, computed = [0.0] * self._num_micro, [float(NEVER)] * (self._grad - self._num_micro)
        return [*given, *computed, *computed, *given, 0.0]

    def _half(self, op: Op) -> tuple[int, float, int]:
        kind, stage, micro, _ = op
        key = stage * self._num_micro + micro
        if kind == W:
            return 0, 0.0, 2 * self._grad
        if kind == F:
            return key, self._hop(stage - 1, stage), key + self._num_micro
        return key + self._num_micro + self._grad, self._hop(stage, stage + 1), key + self._grad

    def _hop(self, stage: int, following: int) -> float:
        inside = stage >= 0 and following < self._placement.num_stages
        return self._costs.comm if inside and self._placement.rank(stage) != self._placement.rank(following) else 0.0


def times_of(plan: Plan, costs: CostModel) -> Times:
    """When each op of a plan of compute ops starts and ends.

    Raises:
        Unclear: see `Inputs`; or the plan does not complete.
        PlanError: the costs are for another number of stages.
    """
    try:
        inputs = Inputs(plan, costs, plan.columns)
    except ValueError:
        raise Unclear from None
    starts, arrivals, free = run(inputs.rows(), inputs.ready())
    begin = np.fromiter(chain.from_iterable(starts), np.float64)
    return Times(begin, begin + inputs.seconds, np.fromiter(chain.from_iterable(arrivals), np.float64), max(free))


def run(
    programs: Iterable[Iterable[Row]], ready: list[float]
) -> tuple[list[list[float]], list[list[float]], list[float]]:
    """For each rank when its ops start and when their inputs are there, and when the rank is through.

    Args:
        programs: the ops of each rank in order.
        ready: see `Inputs.ready`; is filled in.

    Raises:
        Unclear: they do not complete.
    """
    rows = list(map(iter, programs))
    free = [0.0] * len(rows)
    starts: list[list[float]] = [[] for _ in rows]
    arrivals: list[list[float]] = [[] for _ in rows]
    held: list[tuple[Row, ...]] = [()] * len(rows)  # what each rank has come to
    runnable, left = list(range(len(rows))), len(rows)
    while runnable:
        rank = runnable.pop()
        now, started, arrived = free[rank], starts[rank].append, arrivals[rank].append
        for row in chain(held[rank], rows[rank]):
            need, hop, make, need_2, hop_2, make_2, seconds = row
            arrival = ready[need]
            if arrival < 0:
                ready[need], held[rank] = WAITS - rank, (row,)
                break
            arrival += hop
            if make_2:
                other = ready[need_2]
                if other < 0:
                    ready[need_2], held[rank] = WAITS - rank, (row,)
                    break
                if other + hop_2 > arrival:
                    arrival = other + hop_2
            if arrival > now:
                now = arrival
            started(now)
            arrived(arrival)
            now += seconds
            waiter = ready[make]
            if waiter <= WAITS:
                runnable.append(WAITS - int(waiter))
            ready[make] = now
            if make_2:
                waiter = ready[make_2]
                if waiter <= WAITS:
                    runnable.append(WAITS - int(waiter))
                ready[make_2] = now
        else:
            left -= 1
        free[rank] = now
    if left:
        raise Unclear
    return starts, arrivals, free


def _must(holds: bool | np.bool_) -> None:
    if not holds:
        raise Unclear


def _looked_up(codes: Ints, value: Callable[[int], float]) -> Seconds:
    """`value` of each code, worked out once for each that there is."""
    if len(codes) and codes.max() < 1 << 22:
        known = np.flatnonzero(np.bincount(codes))
        table = np.zeros(known[-1] + 1)
        table[known] = [value(code) for code in known.tolist()]
        return table[codes]
    known, place = np.unique(codes, return_inverse=True)
    return np.array([value(code) for code in known.tolist()], np.float64)[place]
