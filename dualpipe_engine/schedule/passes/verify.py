"""Prove that a plan is sound before anything runs.

The rules, on compute ops:

1. Each (stage, micro-batch) has on its rank exactly one F and exactly one B, or one I and one W.
2. On a rank F comes before B or I, and I before W; W ops drain the pending gradients first in, first out.
3. All ops can run: no op waits for itself through any path.
4. The halves of a pair are of different micro-batches and independent: a pair starts when the inputs of both are there,
   so a dependency between them shows as a pair that cannot run.

On a lowered plan also:

5. Each send has exactly one receive, and both ends of a directed edge list its messages in one order.
6. No receive before the first stage or after the last, no transfer between stages of one rank.
7. All transfers complete, and posted receives stay within `recv_buffers` for each edge and kind.
8. A tensor is sent after it is made, and its receive is posted before it is used.
9. Activations stay within `activation_cap` and pending weight gradients within `pending_w_cap`; nothing is left at the
   end.
10. Each micro-batch has one loss; each stage has one REDUCE after its last weight gradient, in one order on all ranks
    that hold a copy; STEP is last.

Where activations are offloaded also:

11. OFFLOAD follows the F of its (stage, micro-batch), RELOAD its OFFLOAD, and the backward its RELOAD, each once. What
    is in host memory does not count as alive in rule 9.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from contextlib import suppress

from ...errors import PlanError
from ..gc_paused import collector_paused
from ..op import (
    COMM,
    COMPUTE,
    COPIES,
    FB,
    GRADIENTS,
    OFFLOAD,
    REDUCE,
    RELOAD,
    SENDS,
    STEP,
    STEPS,
    B,
    F,
    I,
    Op,
    W,
    atoms,
)
from ..plan import Plan
from ..walk import walk
from .proof import Report, Unproved, prove
from .routes import Routes


class VerifyError(PlanError):
    """A plan breaks a rule.

    Attributes:
        rule: number of the rule.
        rank: where.
        index: position in the rank's program; its length when something is missing.
        reason: why, in one sentence.
    """

    def __init__(self, plan: Plan, rule: int, rank: int, index: int, reason: str) -> None:
        program = plan.programs[rank]
        op = str(program[index]) if index < len(program) else "end of program"
        super().__init__(f"rank {rank}, {op} (position {index}): {reason} (rule {rule})\n{window(plan, rank, index)}")
        self.rule, self.rank, self.index, self.reason = rule, rank, index, reason


@collector_paused()
def verify(
    plan: Plan,
    *,
    activation_cap: int | None = None,
    pending_w_cap: int | None = None,
    recv_buffers: int | None = None,
) -> Report:
    """Check a plan, lowered or not; a plan without any backward is checked as forward-only.

    A sound plan is proved to be one from its ops as arrays. Only where that fails they are gone through one by one, to
    say which of them breaks which rule.

    Raises:
        VerifyError: a rule does not hold.
    """
    report = None
    with suppress(Unproved):
        report = prove(plan)
    if report is None:
        return _go_through(plan, activation_cap, pending_w_cap, recv_buffers)
    limits = (
        (report.peak_activations, activation_cap),
        (report.peak_pending_w, pending_w_cap),
        (report.peak_receives, recv_buffers),
    )
    if any(limit is not None and max(peaks) > limit for peaks, limit in limits):
        return _go_through(plan, activation_cap, pending_w_cap, recv_buffers)
    return report


def _go_through(plan: Plan, activation_cap: int | None, pending_w_cap: int | None, recv_buffers: int | None) -> Report:
    """All rules, op by op."""
    kinds = {op.kind for program in plan.programs for op in program}
    train = not kinds.isdisjoint((B, I, W, FB))
    lowered = not kinds <= STEPS
    peaks = [_check_compute(plan, rank, train, activation_cap, pending_w_cap) for rank in range(len(plan.programs))]
    routes, receives = Routes(plan.placement, plan.num_micro), [0] * len(plan.programs)
    if lowered:
        messages = _Messages()
        receives = [_check_transfers(plan, rank, routes, messages, recv_buffers) for rank in range(len(plan.programs))]
        _check_edges(plan, messages)
        _check_tail(plan, train)
    _check_completion(plan, routes if lowered else None)
    return Report(tuple(alive for alive, _ in peaks), tuple(pending for _, pending in peaks), tuple(receives))


_NEW, _FORWARDED, _PENDING, _DONE, _AWAY, _BACK = range(6)
_NEEDS = {
    F: {_NEW},
    B: {_FORWARDED, _BACK},
    I: {_FORWARDED, _BACK},
    W: {_PENDING},
    OFFLOAD: {_FORWARDED},
    RELOAD: {_AWAY},
}
_BECOMES = {F: _FORWARDED, B: _DONE, I: _PENDING, W: _DONE, OFFLOAD: _AWAY, RELOAD: _BACK}
_SAID = (
    "it has not run forward",
    "its forward has run already",
    "it waits for W",
    "it is finished already",
    "its activation is in host memory, and has not been brought back",
    "its activation has been brought back from host memory",
)
_RULES = {_AWAY: 11, _BACK: 11, _DONE: 1}


def _check_compute(plan: Plan, rank: int, train: bool, cap: int | None, w_cap: int | None) -> tuple[int, int]:
    """Rules 1, 2, 4, 9 and 11 on one rank."""
    placement, num_micro = plan.placement, plan.num_micro
    own = {stage * num_micro + micro for stage in placement.stages_of(rank) for micro in range(num_micro)}
    own = {key for key in own if placement.rank_of(key // num_micro, key % num_micro) == rank}
    state = dict.fromkeys(own, _NEW)
    pending: deque[int] = deque()
    alive = peak = peak_pending = 0
    for index, op in enumerate(plan.programs[rank]):
        if op.kind not in STEPS:
            continue
        if op.kind == FB:
            _check_pair(plan, rank, index, op)
        for part in op.parts or (op,):
            kind, stage, micro, _ = part
            key = stage * num_micro + micro
            now = state.get(key) if 0 <= micro < num_micro else None
            if now is None:
                reason = f"stage {stage}, micro-batch {micro} does not belong to this rank"
                raise VerifyError(plan, 1, rank, index, reason)
            if now not in _NEEDS[kind]:
                rule = 11 if kind in COPIES else 1 if kind == F else _RULES.get(now, 2)
                raise VerifyError(plan, rule, rank, index, f"{part} cannot run here: {_SAID[now]}")
            state[key] = _BECOMES[kind]
            if kind in (F, RELOAD):
                alive += 1
                if alive > peak:
                    peak = alive
                    if cap is not None and peak > cap:
                        raise VerifyError(plan, 9, rank, index, f"{peak} activations alive, the cap is {cap}")
            elif kind == I:
                pending.append(key)
                peak_pending = max(peak_pending, len(pending))
                if w_cap is not None and len(pending) > w_cap:
                    raise VerifyError(plan, 9, rank, index, f"{len(pending)} weight gradients wait, more than {w_cap}")
            else:  # B, W or OFFLOAD
                alive -= 1
                if kind == W and pending.popleft() != key:
                    raise VerifyError(
                        plan, 2, rank, index, "an older weight gradient waits: W runs first in, first out"
                    )
    final = _DONE if train else _FORWARDED
    for key in sorted(own):
        if state[key] != final:
            stage, micro = divmod(key, num_micro)
            missing = ("F", "B or I", "W", "", "RELOAD", "B or I")[state[key]]
            rule, end = (11 if state[key] == _AWAY else 1), len(plan.programs[rank])
            raise VerifyError(plan, rule, rank, end, f"stage {stage}, micro-batch {micro} has no {missing}")
    return peak, peak_pending


def _check_pair(plan: Plan, rank: int, index: int, op: Op) -> None:
    forward, backward = op.parts
    if forward.micro == backward.micro:
        raise VerifyError(plan, 4, rank, index, "a pair holds different micro-batches")


class _Messages:
    """What all ranks send and receive.

    Attributes:
        sent: (source, target) -> the sends, in order.
        received: the same of the receives, each with its position in the target's program.
    """

    def __init__(self) -> None:
        self.sent: dict[tuple[int, int], list[Op]] = defaultdict(list)
        self.received: dict[tuple[int, int], list[tuple[Op, int]]] = defaultdict(list)


def _check_transfers(plan: Plan, rank: int, routes: Routes, messages: _Messages, recv_buffers: int | None) -> int:
    """Rules 5 (each stands once), 6, 7 (buffers) and 8 on one rank; returns the most posted receives of one edge and
    kind."""
    made: set[tuple[bool, int, int]] = set()
    moved: set[Op] = set()
    arriving: set[tuple[bool, int, int]] = set()
    unsent: dict[tuple[bool, int, int], int] = {}  # result -> position of the op that has made it
    posted: Counter[tuple[bool, int]] = Counter()
    peak = 0
    for index, op in enumerate(plan.programs[rank]):
        if op.kind in COMM:
            home, target, source = routes.ends(op)
            peer = target if op.kind in SENDS else source
            if home != rank or peer is None:
                raise VerifyError(plan, 6, rank, index, "there is no such transfer to or from another rank")
            if op in moved:
                raise VerifyError(plan, 5, rank, index, "this transfer stands here twice")
            moved.add(op)
            forward = op.is_forward
            result = forward, op.stage, op.micro
            if op.kind in SENDS:
                if unsent.pop(result, None) is None:
                    raise VerifyError(plan, 8, rank, index, "the tensor is sent before it is made")
                messages.sent[rank, peer].append(op)
                continue
            if result in made:
                raise VerifyError(plan, 8, rank, index, "the receive is posted after the op that uses it")
            messages.received[peer, rank].append((op, index))
            arriving.add(result)
            posted[forward, peer] += 1
            if posted[forward, peer] > peak:
                peak = posted[forward, peer]
                if recv_buffers is not None and peak > recv_buffers:
                    raise VerifyError(plan, 7, rank, index, f"more than {recv_buffers} receives on this edge")
        elif op.kind in COMPUTE:
            for part in atoms(op):
                if part.kind == W:
                    continue
                forward = part.kind == F
                result = forward, part.stage, part.micro
                _, target, source = routes.ends(part)
                made.add(result)
                if target is not None:
                    unsent[result] = index
                if source is not None:
                    if result not in arriving:
                        raise VerifyError(plan, 8, rank, index, f"{part.receive()} has not been posted before")
                    posted[forward, source] -= 1
    if unsent:
        (forward, stage, micro), index = min(unsent.items(), key=lambda each: each[1])
        send = Op(F if forward else B, stage, micro).send()
        raise VerifyError(plan, 5, rank, index, f"{send} does not follow, but the other rank needs it")
    return peak


def _check_edges(plan: Plan, messages: _Messages) -> None:
    """Rule 5: both ends of a directed edge list its messages in one order."""
    for (source, target), posts in messages.received.items():
        sent = messages.sent[source, target]
        for place, (receive, index) in enumerate(posts):
            message = sent[place] if place < len(sent) else None
            if message != receive.other_end():
                what = "nothing" if message is None else str(message)
                raise VerifyError(
                    plan, 5, target, index, f"as message {place} of this edge rank {source} sends {what}: orders differ"
                )


def _check_tail(plan: Plan, train: bool) -> None:
    """Rule 10."""
    orders: dict[int, list[int]] = {}
    for rank, program in enumerate(plan.programs):
        last = {part.stage: i for i, op in enumerate(program) for part in atoms(op) if part.kind in GRADIENTS}
        order: list[int] = []
        stages = set(plan.placement.stages_of(rank))
        for index, op in enumerate(program):
            if op.kind == REDUCE:
                if not train or op.stage not in stages or op.stage in order:
                    raise VerifyError(plan, 10, rank, index, "this rank has no such reduction, or has it twice")
                if index < last.get(op.stage, -1):
                    raise VerifyError(plan, 10, rank, index, "weight gradients of the stage follow its reduction")
                order.append(op.stage)
            elif op.kind == STEP and (not train or index != len(program) - 1):
                raise VerifyError(plan, 10, rank, index, "STEP is the last op of a training plan, and there is one")
        if train and (stages - set(order) or program[-1].kind != STEP):
            missing = ", ".join(f"{stage}REDUCE" for stage in sorted(stages - set(order))) or "STEP"
            raise VerifyError(plan, 10, rank, len(program), f"{missing} is missing")
        orders[rank] = order
        twin = min(plan.placement.replicas(min(stages)))
        if twin in orders and orders[twin] != order:
            index = next(i for i, op in enumerate(program) if op.kind == REDUCE)
            raise VerifyError(plan, 10, rank, index, f"rank {twin} reduces the same stages in another order")


def _check_completion(plan: Plan, routes: Routes | None) -> None:
    """Rules 3, 4 and 7: run all programs, each op as soon as its inputs are there; with `routes` what goes to another
    rank is there when it is sent."""
    num_micro, last = plan.num_micro, plan.placement.num_stages - 1
    outputs = num_micro  # key of a result: forwards of stage s at (s + 1) * M, gradients of stage s behind all of these
    grads = (last + 2) * num_micro
    there = bytearray(grads + (last + 2) * num_micro)
    there[:num_micro] = b"\1" * num_micro  # the batch
    there[grads + (last + 1) * num_micro :] = b"\1" * num_micro  # the losses' own gradients

    def attempt(rank: int, position: int) -> int | list[int]:
        kind, stage, micro, parts = op = plan.programs[rank][position]
        made = []
        if kind in COMPUTE:
            for part in parts or (op,):
                of, at_stage, number, _ = part
                if of == F:
                    key = at_stage * num_micro + number
                elif of == W:
                    continue
                else:
                    key = grads + (at_stage + 1) * num_micro + number
                if not there[key]:
                    return key
                if routes is None or routes.ends(part).target is None:
                    made.append(at_stage * num_micro + number + (outputs if of == F else grads))
        elif kind in SENDS:
            made = [stage * num_micro + micro + (outputs if op.is_forward else grads)]
        for key in made:
            there[key] = 1
        return made

    at, waiting = walk(plan.programs, attempt)
    for rank, program in enumerate(plan.programs):
        if at[rank] < len(program):
            _stuck(plan, rank, at[rank], waiting, grads)


def _stuck(plan: Plan, rank: int, index: int, waiting: dict[int, list[int]], grads: int) -> None:
    num_micro = plan.num_micro
    key = next(key for key, ranks in waiting.items() if rank in ranks)
    micro = key % num_micro
    if key < grads:
        text = f"the output of stage {key // num_micro - 1} for micro-batch {micro}"
    else:
        text = f"the input gradient of stage {(key - grads) // num_micro} for micro-batch {micro}"
    raise VerifyError(plan, 3, rank, index, f"it waits for {text}, which never comes")


_AROUND = 3


def window(plan: Plan, rank: int, index: int) -> str:
    """Ranks around `rank`, ops around `index`; an arrow marks the op."""
    ranks = range(max(0, rank - _AROUND), min(len(plan.programs), rank + _AROUND + 1))
    first = max(0, index - _AROUND)
    rows = []
    for other in ranks:
        cells = [str(op) for op in plan.programs[other][first : index + _AROUND + 1]]
        if other == rank:
            at = index - first
            cells[at : at + 1] = [f">>{cells[at]}<<" if at < len(cells) else ">>end<<"]
        rows.append([f"rank {other}", *cells])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return f"ops from position {first}:\n" + "\n".join(lines)
