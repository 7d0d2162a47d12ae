"""Rewrite plans: split and make pairs, fuse and join backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, compress

import numpy as np

from ..columns import B_, F_, I_, W_, Ints, Which, directions, make_ops, peers
from ..op import FB, B, I, Op, W, pair
from ..plan import Plan
from ..timing.costs import CostModel
from ..timing.simulate import timed
from ..timing.times import Spans


def unpair(plan: Plan, last: int | None = None) -> Plan:
    """Split pairs into their forward, then their backward: the last `last` of every rank, None: all.

    A pair delays the forward's output until the backward is done too: where both do not overlap, pairs do harm. Where
    they overlap they still do at the end, when the whole batch waits for the last forwards to come back as gradients.
    """

    every = plan.columns
    second = np.diff(every.op, prepend=-1) == 0
    if last is not None:  # counted from the end of each rank
        behind = np.cumsum(second[::-1])[::-1] - second
        ends = np.searchsorted(every.rank, np.arange(len(plan.programs)), side="right") - 1
        second &= behind - behind[ends][every.rank] < last
    splits = np.zeros(plan.num_ops, bool)
    splits[every.op[second]] = True
    ops = chain.from_iterable(plan.programs)
    halves = chain.from_iterable(op.parts if split else (op,) for op, split in zip(ops, splits.tolist(), strict=True))
    return plan.with_ops(halves, every._replace(op=every.op + np.cumsum(second)))


def pair_up(plan: Plan, costs: CostModel) -> Plan:
    """Make a pair of every forward and full backward of another stage that stand next to each other and need not wait.

    Where pairs overlap well, the time that one saves outweighs that the forward's output comes later. DualPipe's order
    runs the first steady round of the middle ranks unpaired.

    Only a backward whose inputs arrive before its forward would end gets into a pair. So whatever a pair waits for ends
    before its forward would, whatever waits for a pair starts after that, and the plan still completes.

    Raises:
        PlanError: the plan cannot complete.
    """
    times, ops = timed(plan, costs), list(chain.from_iterable(plan.programs))
    alone, kind, stage, _ = _single(plan)
    before, there = slice(None, -1), slice(1, None)  # neighbours
    joins = alone[before] & alone[there] & (kind[before] == F_) & (kind[there] == B_) & _neighbours(plan)
    joins &= (stage[before] != stage[there]) & (times.arrivals[there] < times.ends[before])
    for at in np.flatnonzero(joins).tolist():
        ops[at] = pair(ops[at], ops[at + 1])
    stays = np.append(True, ~joins)  # of pairs their first halves
    every = plan.columns
    return plan.with_ops(compress(ops, stays.tolist()), every._replace(op=(np.cumsum(stays) - 1)[every.op]))


def join(plan: Plan) -> Plan:
    """The plan for a model that cannot split its backward: a full B in the place of every I, and no W."""

    def whole(op: Op) -> Op:
        if op.kind == FB:
            return pair(op.parts[0], whole(op.parts[1]))
        return Op(B, op.stage, op.micro) if op.kind == I else op

    return _rewrite(plan, lambda program: (whole(op) for op in program if op.kind != W))


def safe_fuse(plan: Plan, costs: CostModel, spans: Spans | None = None) -> Plan:
    """Make a full B of an I and its W next to it, where nobody waits for the input gradient in between.

    Under `costs` no op starts later than before: the consumer starts at or after the end of the W plus the transfer.

    Args:
        plan: compute ops.
        costs: costs of the stages.
        spans: of the ops under these costs; None: they are worked out.

    Raises:
        PlanError: the plan cannot complete.
    """
    placement, num_micro = plan.placement, plan.num_micro
    times, ops = spans or timed(plan, costs), list(chain.from_iterable(plan.programs))
    alone, kind, stage, micro = _single(plan)
    every = plan.columns
    backward = (every.kind == B_) | (every.kind == I_)
    needed = np.full(placement.num_stages * num_micro, np.inf)  # when the backward of a stage and micro-batch starts
    needed[(every.stage * num_micro + every.micro)[backward]] = times.starts[every.op[backward]]
    before, there = slice(None, -1), slice(1, None)  # neighbours
    fuses = alone[before] & alone[there] & (kind[before] == I_) & (kind[there] == W_) & _neighbours(plan)
    fuses &= (stage[before] == stage[there]) & (micro[before] == micro[there])
    places = np.flatnonzero(fuses & (stage[there] > 0))
    goes = peers(placement).target[1, directions(placement, num_micro)[micro[places]], stage[places]] >= 0
    arrives = times.ends[places + 1] + np.where(goes, costs.comm, 0.0)
    fuses[places] = arrives <= needed[(stage[places] - 1) * num_micro + micro[places]]
    fused = np.flatnonzero(fuses)
    for at, whole in zip(fused.tolist(), make_ops(np.full(len(fused), B_), stage[fused], micro[fused]), strict=True):
        ops[at] = whole
    stays = np.append(True, ~fuses)
    kinds = np.where(np.append(fuses, False)[every.op], np.int8(B_), every.kind)
    left = every._replace(kind=kinds, op=(np.cumsum(stays) - 1)[every.op]).only(stays[every.op])
    return plan.with_ops(compress(ops, stays.tolist()), left)


def _single(plan: Plan) -> tuple[Which, Ints, Ints, Ints]:
    """Of each op whether it is no pair; and kind, stage and micro-batch of its first half."""
    kind, stage, micro, _, op = plan.columns
    first = np.flatnonzero(np.diff(op, prepend=-1))
    return np.bincount(op, minlength=plan.num_ops) == 1, kind[first], stage[first], micro[first]


def _neighbours(plan: Plan) -> Which:
    """Of each op but the last whether the next one is of the same rank."""
    rank = np.repeat(np.arange(len(plan.programs)), [len(program) for program in plan.programs])
    return np.diff(rank) == 0


def _rewrite(plan: Plan, change: Callable[[tuple[Op, ...]], Iterable[Op]]) -> Plan:
    return replace(plan, programs=tuple(tuple(change(program)) for program in plan.programs))
