"""Offload: which activations leave for host memory, and when they come back (PipeOffload, arXiv 2503.01328).

Added to a plan of compute ops. The copy of an activation begins when its F has ended and runs under the ops that
follow; `OFFLOAD` stands where it has to be done and the device's memory is let go. `RELOAD` takes memory on the device
again and begins the copy back, which runs under the ops before the backward. So an activation takes memory on the
device from F to OFFLOAD and from RELOAD to B or W, and each copy has at least one compute op to hide under.

    F3  |  op under the copy  OFFLOAD3  |  ... in host memory ...  |  RELOAD3  op under the copy  |  B3
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import NamedTuple

from ...errors import PlanError
from ..op import GRADIENTS, OFFLOAD, RELOAD, B, F, I, Op, atoms
from ..plan import Plan
from ..timing.costs import UNIT, CostModel

ALL = True


class _Away(NamedTuple):
    """A stretch in host memory: before which op of the rank's program it begins and ends."""

    begin: int
    end: int
    stage: int
    micro: int


def offload(plan: Plan, fewer: bool | int, costs: CostModel = UNIT, exact: bool = False) -> Plan:
    """Add OFFLOAD and RELOAD to the programs of a plan.

    Args:
        plan: compute ops only.
        fewer: by how many activations, each of one stage and one micro-batch, the peak of every rank shall fall, where
            that can be; those that live longest leave first. True: all leave that can; False: none.
        costs: costs of the stages of the placement; a copy gets as many ops to hide under as last as long as it.
        exact: a number by which the peak of no rank can fall is refused, not taken for the largest that can be.

    Raises:
        PlanError: activations of this plan are offloaded already, or see `exact`.
    """
    if fewer is False:
        return plan
    if plan.has_copies():
        raise PlanError("this plan says itself which activations are offloaded: leave the number out")
    costs.check(plan.placement.num_stages)
    can_leave = [_candidates(program, costs) for program in plan.programs]
    if exact and fewer is not ALL and fewer > (most := max(map(_most, plan.programs, can_leave))):
        remedy = f"say {most}, or that all shall leave" if most else "leave it out"
        raise PlanError(
            f"offload_activations = {fewer}: on no rank of {plan.schedule} can the peak fall by more than {most} with "
            f"{plan.num_micro} micro-batches: {remedy}"
        )
    programs = tuple(
        _with_copies(program, _chosen(program, away, fewer))
        for program, away in zip(plan.programs, can_leave, strict=True)
    )
    return Plan(plan.placement, plan.num_micro, programs, plan.schedule)


def least_that_fits(most: int, fits: Callable[[int], bool]) -> int | None:
    """The smallest number for `offload` that fits, 1 to `most`; None: not even `most` does.

    Args:
        most: the largest number that changes anything, the peak of activations.
        fits: whether a plan with so many fewer fits.
    """
    least = 0
    if most < 1 or not fits(most):
        return None
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle, most)
    return most


def _candidates(program: tuple[Op, ...], costs: CostModel) -> list[_Away]:
    """Where each activation can be away for at least one op."""
    found, forwards = [], {}
    ends = [0.0]  # seconds of computation up to each op
    for op in program:
        ends.append(ends[-1] + costs.duration(op))
    for index, op in enumerate(program):
        for part in atoms(op):
            key = part.stage, part.micro
            if part.kind == F:
                forwards[key] = index
            elif part.kind in (B, I):
                start, copy = forwards[key], costs.copy_at(part.stage)
                begin, end = start + 2, index - 1
                while begin < end and ends[begin] - ends[start + 1] < copy:
                    begin += 1
                while begin < end and ends[index] - ends[end] < copy:
                    end -= 1
                if begin < end:
                    found.append(_Away(begin, end, *key))
    return sorted(found)


def _chosen(program: tuple[Op, ...], candidates: list[_Away], fewer: bool | int) -> list[_Away]:
    """Those that bring the peak down by `fewer`, or as far as it goes: wherever more would be held, whoever comes back
    last is to be away."""
    if fewer is ALL:
        return candidates
    held = _held(program)
    target = max(held, default=0) - min(fewer, _most(program, candidates))
    chosen: list[_Away] = []
    waiting = deque(candidates)  # by begin
    open_: list[tuple[int, int, _Away]] = []  # by end, the last one first
    for index in range(len(program)):
        while waiting and waiting[0].begin <= index:
            heappush(open_, (-waiting[0].end, waiting[0].begin, waiting.popleft()))
        while held[index] > target and open_ and open_[0][2].end > index:
            each = heappop(open_)[2]
            chosen.append(each)
            for away in range(each.begin, each.end):
                held[away] -= 1
    return chosen


def _most(program: tuple[Op, ...], candidates: list[_Away]) -> int:
    """By how many activations the peak of the rank can fall."""
    held = _held(program)
    return max(held, default=0) - max(_less(held, candidates), default=0)


def _less(held: list[int], away: list[_Away]) -> list[int]:
    """How many activations are held when these are away."""
    held = held.copy()
    for each in away:
        for index in range(each.begin, each.end):
            held[index] -= 1
    return held


def _held(program: tuple[Op, ...]) -> list[int]:
    """How many activations the rank holds during each op."""
    held, now = [], 0
    for op in program:
        parts = atoms(op)
        now += sum(part.kind == F for part in parts)
        held.append(now)
        now -= sum(part.kind in GRADIENTS for part in parts)
    return held


def _with_copies(program: tuple[Op, ...], chosen: list[_Away]) -> tuple[Op, ...]:
    """Before each op what has left is let go first, so that what comes back finds room."""
    added: dict[int, list[Op]] = defaultdict(list)
    for each in sorted(chosen):
        added[each.begin].append(Op(OFFLOAD, each.stage, each.micro))
    for each in sorted(chosen, key=lambda each: each.end):
        added[each.end].append(Op(RELOAD, each.stage, each.micro))
    return tuple(step for index, op in enumerate(program) for step in (*added.get(index, ()), op))
