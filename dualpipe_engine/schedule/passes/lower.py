"""Lower a compute plan: add its transfers and its tail. Also the compute plans of evaluation and inference."""

from __future__ import annotations

from collections import defaultdict

from ...errors import PlanError
from ..gc_paused import collector_paused
from ..op import COPIES, GRADIENTS, NONE, REDUCE, STEP, STEPS, F, Op, W, atoms
from ..placement import Placement
from ..plan import Plan
from .routes import Routes

_TAKES_NOTHING = COPIES | {W}  #: of what another stage has made

_Slots = list[dict[int, list[Op]]]  # per rank: the ops to add at an index of the compute program


@collector_paused()
def lower(plan: Plan, *, train: bool = True) -> Plan:
    """Add sends, receives and the tail to the compute ops (and copies to host memory) of every rank.

    A send stands right after the op that makes its tensor. The receives of a directed edge (source rank to destination
    rank) are posted in exactly the order of the source's sends, because p2p transfers carry no tags. Each is posted as
    late as that order allows, but before the F or backward that precedes its consumer, so that the transfer can run
    under that op. A W in between does not count: the other end may have to send before it goes on, and two ranks that
    pass on to each other (PP = 2, `loop`) would each wait for the other's receive. Neighbour stages on one rank hand
    over locally, without transfers.

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
    for rank, program in enumerate(plan.programs):
        for op in program:
            if op.kind not in STEPS:
                raise PlanError(f"rank {rank}: {op} shows that the plan is lowered already; lower plan.unlowered()")

    sends, posts = _transfers(plan)
    reduces = _reduces(plan) if train else [{} for _ in plan.programs]
    programs = []
    for rank, program in enumerate(plan.programs):
        ops: list[Op] = []
        for index, op in enumerate(program):
            ops += posts[rank].get(index, ())
            ops.append(op)
            ops += sends[rank].get(index, ())
            ops += reduces[rank].get(index, ())
        if train:
            ops.append(Op(STEP, NONE, NONE))
        programs.append(tuple(ops))
    return Plan(plan.placement, plan.num_micro, tuple(programs), plan.schedule)


def _transfers(plan: Plan) -> tuple[_Slots, _Slots]:
    """Sends by the index of the op that they follow, receives by the index of the op that they precede."""
    routes = Routes(plan.placement, plan.num_micro)
    sends: _Slots = [defaultdict(list) for _ in plan.programs]
    arriving: dict[tuple[int, int], list[Op]] = defaultdict(list)  # directed edge -> receives in the order of the sends
    consumer: dict[tuple[bool, int, int], int] = {}  # of a receive -> index of the op that uses it
    for rank, program in enumerate(plan.programs):
        for index, op in enumerate(program):
            for part in atoms(op):
                if part.kind in _TAKES_NOTHING:
                    continue
                consumer[part.kind == F, part.stage, part.micro] = index
                if (target := routes.ends(part).target) is not None:
                    send = part.send()
                    sends[rank][index].append(send)
                    arriving[rank, target].append(send.other_end())
    befores = [_before(program) for program in plan.programs]
    posts: _Slots = [defaultdict(list) for _ in plan.programs]
    for (_, rank), receives in sorted(arriving.items()):
        latest, under = len(plan.programs[rank]), befores[rank]
        slots = []
        for receive in reversed(receives):
            latest = min(latest, under[consumer[receive.is_forward, receive.stage, receive.micro]])
            slots.append(latest)
        for receive, slot in zip(receives, reversed(slots), strict=True):
            posts[rank][slot].append(receive)
    return sends, posts


def _before(program: tuple[Op, ...]) -> list[int]:
    """For each op the index of the one before it that takes something, 0 where there is none."""
    found, latest = [], 0
    for index, op in enumerate(program):
        found.append(latest)
        if op.kind not in _TAKES_NOTHING:
            latest = index
    return found


def _reduces(plan: Plan) -> _Slots:
    """REDUCE ops by the index of the op that they follow."""
    placement = plan.placement
    done = []  # per rank: stage -> index of the last op that adds to its weight gradient, else the end
    for rank, program in enumerate(plan.programs):
        final = dict.fromkeys(placement.stages_of(rank), len(program) - 1)
        final |= {part.stage: i for i, op in enumerate(program) for part in atoms(op) if part.kind in GRADIENTS}
        done.append(final)
    reduces: _Slots = [defaultdict(list) for _ in plan.programs]
    for rank, final in enumerate(done):
        # The same order on all ranks that hold the stages: by when the last copy is done.
        ready = {stage: max(done[twin][stage] for twin in placement.replicas(stage)) for stage in final}
        slot = 0
        for stage in sorted(final, key=lambda stage: (ready[stage], stage)):
            slot = max(slot, final[stage])
            reduces[rank][slot].append(Op(REDUCE, stage, NONE))
    return reduces


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
