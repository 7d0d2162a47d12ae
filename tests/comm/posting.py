"""A model of the order in which ranks post transfers, and of what a device may make of it.

`host_steps` is what the host of a rank does in a step, by the rules of `Edges`; test_posting.py compares the two.
`is_stuck` runs all ranks of a plan under one of three rules:

- `rendezvous`: the first message of a directed edge holds the host until its peer posts too (a NCCL communicator that
  is connected by its first message);
- `in_flight`: a rank has so many hardware queues, each kept by a transfer that its peer has not joined; a further one,
  and everything behind it, waits for one of them;
- `behind`: so many transfers of one communicator that its peer has not joined hold nothing, one more holds everything
  that the rank launches after it. With 1 that is all streams in one hardware queue: a kernel that runs holds nothing, a
  kernel that waits for the one before it on its stream does.

The order of events does not matter: what one rank may do is never taken back by what another does, so if any order of
events finishes, all do.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import NamedTuple

from dualpipe_engine.schedule.op import COMPUTE, FB, RECV_B, RECV_F, SEND_B, SEND_F, W, atoms

POST, SEND, NEED = "post", "send", "need"
AHEAD = {SEND_F: 1, SEND_B: -1, RECV_F: -1, RECV_B: 1}  # from the stage of the op to the one at the other end


class Step(NamedTuple):
    """One act of a host: `NEED` waits until `count` transfers of the edge are done, the others start one."""

    act: str
    edge: tuple[int, int]  # source and destination
    count: int = 0


class _Message:
    def __init__(self, kind, stage, edge):
        self.kind, self.stage, self.edge = kind, stage, edge
        self.posted = False
        self.last = 0


class _Host:
    """Rules of `Edges`, on one rank: `ahead` messages of each source are posted before they are needed."""

    def __init__(self, plan, rank, ahead, tensors, first):
        self.plan, self.rank, self.ahead, self.tensors = plan, rank, ahead, tensors
        self.sent_header = set() if first else None
        self.known = set() if first else None
        self.steps = []
        self.messages = {}
        self.waiting = defaultdict(deque)
        self.open = defaultdict(int)
        self.posted = defaultdict(int)

    def other(self, op):
        return self.plan.placement.rank_of(op.stage + AHEAD[op.kind], op.micro)

    def send(self, op):
        edge, header = (self.rank, self.other(op)), 0
        if op.kind == SEND_F and self.sent_header is not None and op.stage not in self.sent_header:
            self.sent_header.add(op.stage)
            header = 1
        self.steps += [Step(SEND, edge)] * (self.tensors + header)

    def ask(self, op):
        edge = (self.other(op), self.rank)
        message = self.messages[op.kind, op.stage, op.micro] = _Message(op.kind, op.stage, edge)
        self.waiting[edge].append(message)
        if len(self.waiting[edge]) == 1:
            self.advance(edge)

    def is_known(self, message):
        return self.known is None or message.kind == RECV_B or message.stage in self.known

    def advance(self, edge):
        waiting = self.waiting[edge]
        while waiting and (self.ahead is None or self.open[edge] < self.ahead) and self.is_known(waiting[0]):
            self.post(waiting.popleft())

    def post(self, message):
        message.posted = True
        self.open[message.edge] += 1
        self.steps += [Step(POST, message.edge)] * self.tensors
        self.posted[message.edge] += self.tensors
        message.last = self.posted[message.edge]

    def need(self, kind, stage, micro):
        message = self.messages.pop((kind, stage, micro), None)
        if message is None:
            return
        edge = message.edge
        while not message.posted:
            first = self.waiting[edge].popleft()
            if not self.is_known(first):
                self.known.add(first.stage)
                self.posted[edge] += 1
                self.steps += [Step(POST, edge), Step(NEED, edge, self.posted[edge])]
            self.post(first)
        self.steps.append(Step(NEED, edge, message.last))
        self.open[edge] -= 1
        self.advance(edge)


def host_steps(plan, rank, ahead, tensors=1, first=False, overlapped=True):
    """The steps of one rank.

    Args:
        plan: lowered.
        rank: which.
        ahead: messages of one source that are posted and not needed yet; None: any number.
        tensors: of a message.
        first: whether it is the first step, in which headers tell the shapes.
        overlapped: whether the halves of a pair run at once; else the forward's output leaves before the backward.
    """
    host = _Host(plan, rank, ahead, tensors, first)
    left_early = set()
    for op in plan.programs[rank]:
        if op.kind in (RECV_F, RECV_B):
            host.ask(op)
        elif op.kind in (SEND_F, SEND_B):
            if op not in left_early:
                host.send(op)
        elif op.kind in COMPUTE:
            for part in atoms(op):
                if part.kind == W:
                    continue
                host.need(RECV_F if part.kind == "F" else RECV_B, part.stage, part.micro)
                if op.kind == FB and not overlapped and part.kind == "F":
                    early = part._replace(kind=SEND_F)
                    if early in plan.programs[rank]:
                        left_early.add(early)
                        host.send(early)
    return host.steps


def is_stuck(plan, ahead, *, rendezvous=False, in_flight=None, behind=None, **kwargs):
    """The ranks that do not finish the step, with the step at which each stands; empty when all do."""
    ranks = range(len(plan.programs))
    steps = [host_steps(plan, rank, ahead, **kwargs) for rank in ranks]
    at = [0 for _ in ranks]
    joined = {edge: [0, 0] for each in steps for _, edge, _ in each}  # sent, posted
    edges = [[edge for edge in joined if rank in edge] for rank in ranks]

    def alone(rank, edge):
        """Transfers of `edge` that `rank` has started and its peer has not joined."""
        both = joined[edge]
        return max(0, both[edge[1] == rank] - min(both))

    def may(rank, step):
        act, edge, count = step
        if rendezvous and any(alone(rank, other) and min(joined[other]) == 0 for other in edges[rank]):
            return False
        if act == NEED:
            return min(joined[edge]) >= count
        if in_flight is not None and sum(alone(rank, other) for other in edges[rank]) >= in_flight:
            return False
        return behind is None or alone(rank, edge) < behind

    moved = True
    while moved:
        moved = False
        for rank in ranks:
            while at[rank] < len(steps[rank]) and may(rank, steps[rank][at[rank]]):
                act, edge, _ = steps[rank][at[rank]]
                if act != NEED:
                    joined[edge][act == POST] += 1
                at[rank] += 1
                moved = True
    return {rank: steps[rank][at[rank]] for rank in ranks if at[rank] < len(steps[rank])}
