"""Shorten a plan by small changes on its critical path, the ops and transfers whose seconds add up to the makespan."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from math import inf, log
from random import Random

from ..gc_paused import collector_paused
from ..op import FB, B, F, I, Op, W, atoms, pair
from ..plan import Plan
from ..timing.costs import CostModel
from ..timing.times import Row, Rows, Unclear, run

FAR = 10  #: places by which an op moves at most
WARM = 1e-3  #: part by which a change may lengthen the plan at first, for each `WARMS` tries; `MOST_WARM` at most
WARMS, MOST_WARM = 4000, 5e-3


@collector_paused()
def shorten(plan: Plan, costs: CostModel, cap: int, tries: int, split: bool = True) -> Plan:
    """Try changes one by one, and keep each that makes the plan no longer.

    An op moves by some places, a pair falls apart, two neighbours become a pair, a W leaves its I or comes back to it.
    Where both directions of a `bidirectional` plan mirror each other, a change is made to both: half of the ranks are
    searched, and the others do the same. The changes are drawn from a generator with a fixed seed, so that all ranks
    find the same plan.

    Args:
        plan: compute ops that complete, W first in, first out.
        costs: costs of the stages.
        cap: activations (stage, micro-batch) that no rank of the plan exceeds, and that none will.
        tries: changes that are tried.
        split: False: full backwards only.
    """
    search = _Search(plan, costs, cap, split)
    warm = min(MOST_WARM, WARM * max(1.0, tries / WARMS))
    for left in range(tries, 0, -1):
        search.step(warm * (left / tries) ** 2)
    return replace(plan, programs=tuple(map(tuple, search.best())))


class _Search:
    """The best programs so far. Of equally long ones those are better whose ops start earlier.

    Of directions that mirror each other it holds one half of the ranks, with micro-batches 2n and 2n + 1 as n: what a
    rank gets from its mirror image is there when its own is.
    """

    _best: list[list[Op]]
    _path: list[tuple[int, int]]  # rank and place of the ops of a critical path

    def __init__(self, plan: Plan, costs: CostModel, cap: int, split: bool) -> None:
        self._cap, self._split, self._random = cap, split, Random(0)
        self._early = 1e-3 / plan.num_ops  # what starts count beside the makespan
        self.programs, num_micro = [list(program) for program in plan.programs], plan.num_micro
        mirrored = plan.placement.num_directions == 2 and num_micro % 2 == 0
        self._folded = mirrored and [_renumbered(program, _other) for program in self.programs] == self.programs[::-1]
        if self._folded:
            num_micro //= 2
            self.programs = [_renumbered(program, _half) for program in self.programs[: len(self.programs) // 2]]
        self._rows = Rows(plan.placement, num_micro, costs)
        self._timed = [[self._rows.of(op) for op in program] for program in self.programs]
        self._cost = self._least = inf
        self._adopt(self.programs, self._timed, inf)

    def step(self, slack: float) -> None:
        """Try one change; it may lengthen the plan by about this part."""
        rank, at = self._path[self._below(len(self._path))]
        program = self.programs[rank].copy()
        if not self._change(program, at) or not self._settle(program):
            return
        programs, timed = self.programs.copy(), self._timed.copy()
        programs[rank], timed[rank] = program, list(map(self._rows.of, program))
        self._adopt(programs, timed, self._cost * (1 - slack * log(1 - self._random.random())))

    def best(self) -> list[list[Op]]:
        """The shortest programs that were found, of all ranks."""
        if not self._folded:
            return self._best
        ranks = len(self._best)
        here = [_renumbered(program, lambda op: 2 * op.micro + (op.stage >= ranks)) for program in self._best]
        return here + [_renumbered(program, _other) for program in reversed(here)]

    def _adopt(self, programs: list[list[Op]], timed: list[list[Row]], limit: float) -> None:
        """Keep programs that complete and are no worse."""
        try:
            starts, arrivals, free = run(timed, self._rows.ready())
        except Unclear:
            return
        cost = max(free) + self._early * sum(map(sum, starts))
        if max(free) < self._least:
            self._best, self._least = programs, max(free)
        if cost <= limit:
            self.programs, self._timed, self._cost = programs, timed, cost
            self._path = _critical(timed, starts, arrivals, free)

    def _below(self, number: int) -> int:
        return int(self._random.random() * number)

    def _change(self, program: list[Op], at: int) -> bool:
        """Change a program at one of its ops in a way that is drawn; whether there is such a change."""
        op, way = program[at], self._below(10)
        following = program[at + 1] if at + 1 < len(program) else None
        if way < 5:
            there = at + (1 + self._below((2, 2, FAR)[self._below(3)])) * (1 - 2 * self._below(2))
            if 0 <= there < len(program):
                program.insert(there, program.pop(at))
                return True
        elif way < 6:
            if op.kind == FB:
                program[at : at + 1] = op.parts[:: 1 - 2 * self._below(2)]
                return True
        elif way < 8:
            kinds = following and {op.kind: op, following.kind: following}
            if kinds and kinds.keys() == {F, B} and kinds[F].micro != kinds[B].micro:
                program[at : at + 2] = [pair(kinds[F], kinds[B])]
                return True
        elif self._split and op.kind == B:
            program[at] = Op(I, op.stage, op.micro)
            program.insert(at + 1 + self._below(FAR), Op(W, op.stage, op.micro))
            return True
        elif op.kind == I:
            weight = next((place for place in range(at, len(program)) if program[place].kind == W), None)
            if weight is not None:
                program[at] = Op(B, op.stage, op.micro)
                del program[weight]
                return True
        return False

    def _settle(self, program: list[Op]) -> bool:
        """Give each W the micro-batch whose turn it is; whether the program keeps the order of a micro-batch's ops on
        the rank, and the cap."""
        held, ran, waiting = 0, set(), deque[Op]()
        for at, op in enumerate(program):
            for kind, stage, micro, _ in atoms(op):
                if kind == F:
                    held += 1
                    ran.add((stage, micro))
                    if held > self._cap:
                        return False
                elif kind == W:
                    if not waiting:
                        return False
                    program[at] = waiting.popleft()
                    held -= 1
                elif (stage, micro) not in ran:
                    return False
                elif kind == I:
                    waiting.append(Op(W, stage, micro))
                else:
                    held -= 1
        return True


def _renumbered(program: list[Op], number: Callable[[Op], int]) -> list[Op]:
    """The same with other numbers of micro-batches."""
    return [
        pair(*(Op(part.kind, part.stage, number(part)) for part in op.parts))
        if op.parts
        else Op(op.kind, op.stage, number(op))
        for op in program
    ]


def _other(op: Op) -> int:
    """The micro-batch of the other direction."""
    return op.micro ^ 1


def _half(op: Op) -> int:
    """The number of the micro-batch among those of its direction."""
    return op.micro // 2


def _critical(
    timed: list[list[Row]], starts: list[list[float]], arrivals: list[list[float]], free: list[float]
) -> list[tuple[int, int]]:
    """From the end of the plan back to its begin: before each op what it waited for longest."""
    makers = {}
    for rank, rows in enumerate(timed):
        for at, row in enumerate(rows):
            makers[row[2]] = rank, at
            if row[5]:
                makers[row[5]] = rank, at
    rank = free.index(max(free))
    at, path = len(timed[rank]) - 1, []
    while at >= 0:
        path.append((rank, at))
        if at and starts[rank][at - 1] + timed[rank][at - 1][6] >= arrivals[rank][at]:
            at -= 1
            continue
        need, hop, _, need_2, hop_2, make_2, _ = timed[rank][at]
        inputs = [(need, hop), (need_2, hop_2)][: 2 if make_2 else 1]
        found = [(*makers[key], hop) for key, hop in inputs if key in makers]
        if not found:
            break
        rank, at, _ = max(found, key=lambda each: starts[each[0]][each[1]] + timed[each[0]][each[1]][6] + each[2])
    return path
