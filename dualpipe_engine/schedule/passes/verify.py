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
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from ...errors import PlanError
from ..gc_paused import collector_paused
from ..op import COMM, COMPUTE, FB, GRADIENTS, RECEIVES, REDUCE, SENDS, STEP, B, F, I, Op, W, atoms
from ..plan import Plan
from ..walk import walk


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


@dataclass(frozen=True)
class Report:
    """What a sound plan needs, per rank.

    Args:
        peak_activations: most (stage, micro-batch) activations alive at once.
        peak_pending_w: most weight gradients waiting at once.
        peak_receives: most receives posted and not consumed, for one directed edge and kind.
    """

    peak_activations: tuple[int, ...]
    peak_pending_w: tuple[int, ...]
    peak_receives: tuple[int, ...]


@collector_paused()
def verify(
    plan: Plan,
    *,
    activation_cap: int | None = None,
    pending_w_cap: int | None = None,
    recv_buffers: int | None = None,
) -> Report:
    """Check a plan, lowered or not; a plan without any backward is checked as forward-only.

    Raises:
        VerifyError: a rule does not hold.
    """
    kinds = {op.kind for program in plan.programs for op in program}
    train = not kinds.isdisjoint((B, I, W, FB))
    lowered = not kinds <= COMPUTE
    peaks = [_check_compute(plan, rank, train, activation_cap, pending_w_cap) for rank in range(len(plan.programs))]
    receives = tuple(_check_transfers(plan, rank, recv_buffers) if lowered else 0 for rank in range(len(plan.programs)))
    if lowered:
        _check_edges(plan)
        _check_tail(plan, train)
    _check_completion(plan, lowered)
    return Report(tuple(alive for alive, _ in peaks), tuple(pending for _, pending in peaks), receives)


_NEW, _FORWARDED, _PENDING, _DONE = range(4)


def _check_compute(plan: Plan, rank: int, train: bool, cap: int | None, w_cap: int | None) -> tuple[int, int]:
    """Rules 1, 2, 4 and 9 on one rank."""
    placement, num_micro = plan.placement, plan.num_micro
    own = {stage * num_micro + micro for stage in placement.stages_of(rank) for micro in range(num_micro)}
    own = {key for key in own if placement.rank_of(key // num_micro, key % num_micro) == rank}
    state = dict.fromkeys(own, _NEW)
    pending: deque[int] = deque()
    alive = peak = peak_pending = 0
    needed = {F: _NEW, B: _FORWARDED, I: _FORWARDED, W: _PENDING}
    becomes = {F: _FORWARDED, B: _DONE, I: _PENDING, W: _DONE}
    said = ("it has not run forward", "its forward has run already", "it waits for W", "it is finished already")
    for index, op in enumerate(plan.programs[rank]):
        if op.kind not in COMPUTE:
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
            if now != needed[kind]:
                rule = 1 if now == _DONE or (kind == F) else 2
                raise VerifyError(plan, rule, rank, index, f"{part} cannot run here: {said[now]}")
            state[key] = becomes[kind]
            if kind == F:
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
            else:
                alive -= 1
                if kind == W and pending.popleft() != key:
                    raise VerifyError(
                        plan, 2, rank, index, "an older weight gradient waits: W runs first in, first out"
                    )
    final = _DONE if train else _FORWARDED
    for key in sorted(own):
        if state[key] != final:
            stage, micro = divmod(key, num_micro)
            missing = ("F", "B or I", "W")[state[key]]
            raise VerifyError(
                plan, 1, rank, len(plan.programs[rank]), f"stage {stage}, micro-batch {micro} has no {missing}"
            )
    return peak, peak_pending


def _check_pair(plan: Plan, rank: int, index: int, op: Op) -> None:
    forward, backward = op.parts
    if forward.micro == backward.micro:
        raise VerifyError(plan, 4, rank, index, "a pair holds different micro-batches")


def _remote(plan: Plan, rank: int, op: Op) -> int | None:
    """The rank at the other end of a transfer; None when rule 6 is broken."""
    placement, other = plan.placement, op.other_end().stage
    stages = range(placement.num_stages)
    if not 0 <= op.micro < plan.num_micro or op.stage not in stages or other not in stages:
        return None
    if placement.rank_of(op.stage, op.micro) != rank:
        return None
    peer = placement.rank_of(other, op.micro)
    return None if peer == rank else peer


def _check_transfers(plan: Plan, rank: int, recv_buffers: int | None) -> int:
    """Rules 6, 7 (buffers) and 8 on one rank; returns the most posted receives of one edge and kind."""
    placement, last = plan.placement, plan.placement.num_stages - 1
    made: set[tuple[bool, int, int]] = set()
    moved: set[Op] = set()
    posted: Counter[tuple[str, int]] = Counter()
    peak = 0
    for index, op in enumerate(plan.programs[rank]):
        if op.kind in COMM:
            peer = _remote(plan, rank, op)
            if peer is None:
                raise VerifyError(plan, 6, rank, index, "there is no such transfer to or from another rank")
            if op in moved:
                raise VerifyError(plan, 5, rank, index, "this transfer stands here twice")
            moved.add(op)
            result = op.is_forward, op.stage, op.micro
            if op.kind in SENDS and result not in made:
                raise VerifyError(plan, 8, rank, index, "the tensor is sent before it is made")
            if op.kind in RECEIVES:
                if result in made:
                    raise VerifyError(plan, 8, rank, index, "the receive is posted after the op that uses it")
                posted[op.kind, peer] += 1
                peak = max(peak, posted[op.kind, peer])
                if recv_buffers is not None and posted[op.kind, peer] > recv_buffers:
                    raise VerifyError(plan, 7, rank, index, f"more than {recv_buffers} receives on this edge")
        elif op.kind in COMPUTE:
            for part in atoms(op):
                if part.kind == W:
                    continue
                made.add((part.is_forward, part.stage, part.micro))
                need = part.receive()
                source = need.other_end().stage
                if 0 <= source <= last and placement.rank_of(source, part.micro) != rank:
                    if need not in moved:
                        raise VerifyError(plan, 8, rank, index, f"{need} has not been posted before")
                    posted[need.kind, placement.rank_of(source, part.micro)] -= 1
    _check_all_sent(plan, rank, moved)
    return peak


def _check_all_sent(plan: Plan, rank: int, moved: set[Op]) -> None:
    for index, op in enumerate(plan.programs[rank]):
        if op.kind in COMPUTE:
            for part in atoms(op):
                send = part.send()
                if part.kind != W and send not in moved and _remote(plan, rank, send) is not None:
                    raise VerifyError(plan, 5, rank, index, f"{send} does not follow, but the other rank needs it")


def _check_edges(plan: Plan) -> None:
    """Rule 5: both ends of a directed edge list its messages in one order."""
    sent: dict[tuple[int, int], list[Op]] = {}
    received: dict[tuple[int, int], list[tuple[Op, int]]] = {}
    for rank, program in enumerate(plan.programs):
        for index, op in enumerate(program):
            if op.kind in COMM:
                peer = _remote(plan, rank, op)
                assert peer is not None
                if op.kind in SENDS:
                    sent.setdefault((rank, peer), []).append(op)
                else:
                    received.setdefault((peer, rank), []).append((op.other_end(), index))
    for (source, target), posts in received.items():
        messages = sent.get((source, target), [])
        for place, (awaited, index) in enumerate(posts):
            message = messages[place] if place < len(messages) else None
            if message != awaited:
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


def _check_completion(plan: Plan, lowered: bool) -> None:
    """Rules 3, 4 and 7: run all programs, each op as soon as its inputs are there."""
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
            for part, at_stage, number, _ in parts or (op,):
                if part == F:
                    key = at_stage * num_micro + number
                elif part == W:
                    continue
                else:
                    key = grads + (at_stage + 1) * num_micro + number
                if not there[key]:
                    return key
                made.append(at_stage * num_micro + number + (outputs if part == F else grads))
            if lowered:  # what goes to another rank is there when it is sent
                made = [key for key in made if _stays(plan, rank, key, grads)]
        elif kind in SENDS:
            made = [stage * num_micro + micro + (outputs if op.is_forward else grads)]
        for key in made:
            there[key] = 1
        return made

    at, waiting = walk(plan.programs, attempt)
    for rank, program in enumerate(plan.programs):
        if at[rank] < len(program):
            _stuck(plan, rank, at[rank], waiting, grads)


def _stays(plan: Plan, rank: int, key: int, grads: int) -> bool:
    """Whether the consumer of a result is on the same rank, or there is none."""
    num_micro = plan.num_micro
    if key < grads:
        stage, micro = key // num_micro, key % num_micro
    else:
        stage, micro = (key - grads) // num_micro - 1, key % num_micro
    if not 0 <= stage < plan.placement.num_stages:
        return True
    return plan.placement.rank_of(stage, micro) == rank


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
