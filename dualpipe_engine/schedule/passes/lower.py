"""Lower a compute plan: add its transfers and its tail. Also the compute plans of evaluation and inference."""

from __future__ import annotations

from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from ...errors import PlanError
from ..columns import (
    B_,
    BACK,
    I_,
    RECV_B_,
    RECV_F_,
    REDUCE_,
    SEND_B_,
    SEND_F_,
    STEP_,
    W_,
    Columns,
    Ints,
    Which,
    by_group,
    directions,
    make_ops,
    peers,
)
from ..gc_paused import collector_paused
from ..op import NONE, STEPS, F, Op
from ..placement import Placement
from ..plan import Plan
from .queues import ASK, OP, PLACES, REDUCED, SENT, Messages
from .unlock import unlock


class _Group(NamedTuple):
    """Ops that are put in order.

    Args:
        found: their columns.
        places: where each op stands, see `queues.PLACES`.
        turns: its turn there.
    """

    found: Columns
    places: Ints
    turns: Ints


def _group(
    kinds: Ints | int, stages: Ints | int, micros: Ints | int, ranks: Ints, places: Ints, turns: Ints | int = 0
) -> _Group:
    kind, stage, micro, turn = (np.broadcast_to(each, ranks.shape) for each in (kinds, stages, micros, turns))
    return _Group(Columns(kind.astype(np.int8), stage, micro, ranks, np.arange(len(ranks))), places, turn)


@collector_paused()
def lower(plan: Plan, *, train: bool = True) -> Plan:
    """Add sends, receives and the tail to the compute ops (and copies to host memory) of every rank.

    A send stands right after the op that makes its tensor. The receives of a directed edge (source rank to destination
    rank) are posted in exactly the order of the source's sends, because p2p transfers carry no tags. Each is posted as
    late as that order allows, but before the F or backward that precedes its consumer, so that the transfer can run
    under that op. A W in between does not count: the other end may have to send before it goes on, and two ranks that
    pass on to each other (PP = 2, `loop`) would each wait for the other's receive. Where ranks would still wait for
    each other on a device with few hardware queues (`queues.py`), receives are posted earlier, or sends later
    (`unlock.py`). Neighbour stages on one rank hand over locally, without transfers.

    `REDUCE` of a stage follows the last weight gradient of that stage on the rank. Ranks that hold copies of the same
    stages reduce with each other, so both list the stages in one order and the earlier one may have to wait. `STEP` is
    last.

    A receive holds a buffer from its post to its consumer. Two buffers per directed edge and direction of travel
    (forward or backward) are enough for every plan of the generators of this package.

    Args:
        plan: compute ops, and copies where activations are offloaded.
        train: False for a forward-only plan, which gets no tail.

    Raises:
        PlanError: the plan holds transfers or tail ops already (use `plan.unlowered()` to drop them).
    """
    if not set(map(itemgetter(0), chain.from_iterable(plan.programs))) <= STEPS:
        each = ((rank, op) for rank, program in enumerate(plan.programs) for op in program)
        rank, op = next((rank, op) for rank, op in each if op.kind not in STEPS)
        raise PlanError(f"rank {rank}: {op} shows that the plan is lowered already; lower plan.unlowered()")
    found = _columns(plan)
    usual = np.arange(plan.num_ops) * PLACES + OP
    groups = [_Group(found, usual, np.zeros_like(usual)), *_transfers(plan, found)]
    if train:
        groups += [_reduces(plan, found), _steps(plan)]
    return _in_order(plan, groups)


def _in_order(plan: Plan, groups: list[_Group]) -> Plan:
    """The plan of all ops of groups, each where it stands; those of the first group are the plan's, in their order."""
    columns, places, turns = zip(*groups, strict=True)
    *fields, op = (np.concatenate(each) for each in zip(*columns, strict=True))
    op += np.repeat(np.cumsum([0, *map(len, places[:-1])]), [len(each.op) for each in columns])
    place, turn = np.concatenate(places)[op], np.concatenate(turns)[op]
    order = np.lexsort((turn, place)) if turn.any() else np.argsort(place, kind="stable")
    kind, stage, micro, rank, op = (column[order] for column in (*fields, op))
    first, given = np.diff(op, prepend=-1) != 0, op < plan.num_ops
    made = make_ops(kind[~given], stage[~given], micro[~given])
    sources = iter(made), chain.from_iterable(plan.programs)
    ops = map(next, map(sources.__getitem__, given[first].tolist()))
    return plan.with_ops(ops, Columns(kind, stage, micro, rank, np.cumsum(first) - 1))


def _columns(plan: Plan) -> Columns:
    try:
        found = plan.columns
    except ValueError as error:
        raise PlanError(f"the plan cannot be lowered, {error}: verify it first") from None
    for numbers, count in ((found.stage, plan.placement.num_stages), (found.micro, plan.num_micro)):
        wrong = np.flatnonzero((numbers < 0) | (numbers >= count))
        if len(wrong):
            raise PlanError(
                f"rank {found.rank[wrong[0]]} runs a stage or micro-batch that is none: verify the plan first"
            )
    return found


def _transfers(plan: Plan, found: Columns) -> list[_Group]:
    """The receives, and the sends."""
    placement, num_micro = plan.placement, plan.num_micro
    kind, stage, micro, rank, op = (column[found.kind <= I_] for column in found)  # all but W and OTHER
    back = BACK[kind].astype(np.intp)
    key = (back * placement.num_stages + stage) * num_micro + micro
    consumer = np.full(2 * placement.num_stages * num_micro, -1)
    consumer[key] = np.arange(len(op))
    target = peers(placement).target[back, directions(placement, num_micro)[micro], stage]
    sent = np.flatnonzero(target >= 0)
    second = np.diff(op, prepend=-1) == 0
    # Edge by edge in the order of the sends, from the last one on: none is posted after the one behind it.
    by_edge = by_group(target[sent] * placement.num_ranks + rank[sent])
    sent = sent[by_edge]
    step = np.where(back[sent], -1, 1)
    uses = consumer[key[sent] + num_micro * step]
    if (uses < 0).any():
        lost = sent[np.flatnonzero(uses < 0)[0]]
        raise PlanError(
            f"rank {rank[lost]} has an op of stage {stage[lost]} that no other stage follows: verify the plan first"
        )
    messages = Messages(
        rank[sent],
        target[sent],
        _before(plan, found)[op[uses]] * PLACES + ASK,
        op[sent] * PLACES + SENT + second[sent],
        np.zeros((2, len(sent)), np.int64),
        op[sent],
        op[uses],
        second[uses],
        _shown(back[sent], key[sent], consumer, num_micro),
        _first(rank[sent], stage[sent], back[sent]),
        np.append(second[1:], False)[sent],
    )
    for edge in messages.edges():
        messages.asks[edge] = np.minimum.accumulate(messages.asks[edge][::-1])[::-1]
    messages = unlock(messages, _starts(plan), num_micro)
    asked, went = messages.turns
    receives, sends = np.array([[RECV_F_, RECV_B_], [SEND_F_, SEND_B_]], np.int8)[:, back[sent]]
    return [
        _group(receives, stage[sent] + step, micro[sent], target[sent], messages.asks, asked),
        _group(sends, stage[sent], micro[sent], rank[sent], messages.sends, went),
    ]


def _shown(back: Ints, key: Ints, consumer: Ints, num_micro: int) -> Ints:
    """Of each gradient the message of the forward that it comes back for, -1 for a forward."""
    size = len(consumer) // 2
    forward = np.full(size, -1)
    forward[key[back == 0]] = np.flatnonzero(back == 0)
    return np.where(back == 1, forward[np.where(back == 1, key - size - num_micro, 0)], -1)


def _first(rank: Ints, stage: Ints, back: Ints) -> Which:
    """Of each message whether it is the first that goes forward from its stage on this rank."""
    forward = np.flatnonzero(back == 0)
    first = np.zeros(len(back), bool)
    first[forward[np.unique(rank[forward] * (stage.max(initial=0) + 1) + stage[forward], return_index=True)[1]]] = True
    return first


def _before(plan: Plan, found: Columns) -> Ints:
    """For each op the last one before it that is an F, B, I or pair, the first of its program where there is none."""
    takes = np.zeros(plan.num_ops, bool)
    takes[found.op[found.kind <= I_]] = True
    latest = np.where(takes, np.arange(plan.num_ops), 0)
    latest[1:] = latest[:-1].copy()
    starts = _starts(plan)
    latest[starts[starts < plan.num_ops]] = starts[starts < plan.num_ops]
    return np.maximum.accumulate(latest)


def _starts(plan: Plan) -> Ints:
    """Where each rank's ops begin among those of all ranks."""
    return np.cumsum([0, *(len(program) for program in plan.programs[:-1])])


def _reduces(plan: Plan, found: Columns) -> _Group:
    """The REDUCE ops."""
    placement, starts = plan.placement, _starts(plan).tolist()
    gradients = (found.kind == B_) | (found.kind == W_)
    last = np.full((placement.num_ranks, placement.num_stages), -1)
    last[found.rank[gradients], found.stage[gradients]] = found.op[gradients]  # the last one stays
    done: list[dict[int, int]] = []  # per rank: stage -> position in the program of the last gradient, else the end
    for rank, (start, program) in enumerate(zip(starts, plan.programs, strict=True)):
        ends = {stage: int(last[rank, stage]) for stage in placement.stages_of(rank)}
        done.append({stage: end - start if end >= 0 else len(program) - 1 for stage, end in ends.items()})
    reduces = []  # stage, rank and op
    for rank, final in enumerate(done):
        # The same order on all ranks that hold the stages: by when the last copy is done.
        ready = {stage: max(done[twin][stage] for twin in placement.replicas(stage)) for stage in final}
        slot = 0
        for stage in sorted(final, key=lambda stage: (ready[stage], stage)):
            slot = max(slot, final[stage])
            if plan.programs[rank]:
                reduces.append((stage, rank, starts[rank] + slot))
    stages, ranks, slots = np.array(reduces, np.int64).reshape(-1, 3).T
    return _group(REDUCE_, stages, NONE, ranks, slots * PLACES + REDUCED)


def _steps(plan: Plan) -> _Group:
    """A STEP behind all others of each rank."""
    ends = np.cumsum([len(program) for program in plan.programs])
    return _group(STEP_, NONE, NONE, np.arange(len(ends)), ends * PLACES - 1)


def forward_only(placement: Placement, num_micro: int) -> Plan:
    """The compute plan of evaluation and inference: every F, no backward.

    The order is that of ranks that run one F a time step, all at once, each the available one on the deepest stage
    (then the lowest micro-batch). So both directions of `bidirectional` and both stages of a `vee` rank interleave as
    inputs arrive, and no rank hoards work that another one waits for.

    Raises:
        PlanError: `num_micro` is below 1.
    """
    programs: list[list[Op]] = [[] for _ in range(placement.num_ranks)]
    available: list[list[tuple[int, int]]] = [[] for _ in programs]  # per rank: (-stage, micro)
    for micro in range(num_micro):
        available[placement.rank_of(0, micro)].append((0, micro))
    while any(available):
        moved = []
        for rank, ready in enumerate(available):
            if ready:
                task = min(ready)
                ready.remove(task)
                stage, micro = -task[0], task[1]
                programs[rank].append(Op(F, stage, micro))
                if stage + 1 < placement.num_stages:
                    moved.append((stage + 1, micro))
        for stage, micro in moved:
            available[placement.rank_of(stage, micro)].append((-stage, micro))
    return Plan(placement, num_micro, tuple(map(tuple, programs)), "forward-only")
