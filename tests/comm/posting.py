"""A model of the order in which ranks post transfers, and of what a device may make of it.

`host_steps` is what the host of a rank does in a step, by the rules of `Edges`; test_posting.py compares the two.
`is_stuck` runs all ranks under one of three rules:

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
FIRST, EACH = "first", "each"
AHEAD = {SEND_F: 1, SEND_B: -1, RECV_F: -1, RECV_B: 1}  # from the stage of the op to the one at the other end


class Step(NamedTuple):
    """One act of a host: `NEED` waits until `count` transfers of the edge are done, the others start one."""

    act: str
    edge: tuple[int, int]  # source and destination
    count: int = 0


class _Message:
    def __init__(self, kind, stage, micro, edge):
        self.kind, self.stage, self.micro, self.edge = kind, stage, micro, edge
        self.posted = False
        self.header = 0  # which transfer of the edge it is, once posted
        self.last = 0


class _Host:
    """Rules of `Edges`, on one rank: `ahead` messages of each source are posted before they are needed."""

    def __init__(self, plan, rank, ahead, tensors, headers):
        self.plan, self.rank, self.ahead, self.tensors, self.headers = plan, rank, ahead, tensors, headers
        self.sent_header = set()
        self.known = set()
        self.forwarded = set()  # (stage, micro) whose output has left, which tells the shapes of its gradients
        self.steps = []
        self.messages = {}
        self.waiting = defaultdict(deque)
        self.open = defaultdict(int)
        self.posted = defaultdict(int)

    def other(self, op):
        return self.plan.placement.rank_of(op.stage + AHEAD[op.kind], op.micro)

    def send(self, op):
        edge, header = (self.rank, self.other(op)), 0
        if op.kind == SEND_F:
            self.forwarded.add((op.stage, op.micro))
        if op.kind == SEND_F and self.headers is not None and op.stage not in self.sent_header:
            if self.headers == FIRST:
                self.sent_header.add(op.stage)
            header = 1
        self.steps += [Step(SEND, edge)] * (self.tensors + header)

    def ask(self, op):
        edge = (self.other(op), self.rank)
        message = self.messages[op.kind, op.stage, op.micro] = _Message(op.kind, op.stage, op.micro, edge)
        self.waiting[edge].append(message)
        if len(self.waiting[edge]) == 1:
            self.advance(edge)

    def is_known(self, message):
        if message.kind == RECV_B:
            return (message.stage, message.micro) in self.forwarded
        return self.headers is None or message.stage in self.known

    def advance(self, edge):
        waiting = self.waiting[edge]
        while waiting and (self.ahead is None or self.open[edge] < self.ahead):
            if not self.is_known(waiting[0]):
                if waiting[0].kind == RECV_F:
                    self.post_header(waiting[0])
                return
            self.post(waiting.popleft())

    def post_header(self, message):
        if not message.header:
            self.posted[message.edge] += 1
            self.steps.append(Step(POST, message.edge))
            message.header = self.posted[message.edge]

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
                self.post_header(first)
                if self.headers == FIRST:
                    self.known.add(first.stage)
                self.steps.append(Step(NEED, edge, first.header))
            self.post(first)
        self.steps.append(Step(NEED, edge, message.last))
        self.open[edge] -= 1
        self.advance(edge)


def host_steps(plan, rank, ahead, tensors=1, headers=None, overlapped=True):
    """The steps of one rank.

    Args:
        plan: lowered.
        rank: which.
        ahead: messages of one source that are posted and not needed yet; None: any number.
        tensors: operations of a message, which is one where it travels whole.
        headers: which forward messages of a stage come behind a header that tells their shapes: `FIRST`, as in the
            first step, `EACH`, as where shapes change, or None, as in the steps after the first.
        overlapped: whether the halves of a pair run at once; else the forward's output leaves before the backward.
    """
    host = _Host(plan, rank, ahead, tensors, headers)
    left_early = set()
    program = plan.programs[rank]
    for op, following in zip(program, (*program[1:], None), strict=True):
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
                    if early == following:
                        left_early.add(early)
                        host.send(early)
    return host.steps


def is_stuck(steps, *, rendezvous=False, in_flight=None, behind=None):
    """The ranks that do not finish, with the step at which each stands; empty when all do.

    Args:
        steps: for each rank what `host_steps` gives.
        rendezvous, in_flight, behind: the rule.
    """
    joined = {edge: [0, 0] for each in steps for _, edge, _ in each}  # sent, posted
    own = [[(both, rank == edge[1]) for edge, both in joined.items() if rank in edge] for rank in range(len(steps))]
    at = [0 for _ in steps]
    ready = deque(range(len(steps)))
    while ready:
        rank = ready.popleft()
        while at[rank] < len(steps[rank]):
            act, edge, count = steps[rank][at[rank]]
            both, mine = joined[edge], rank == edge[1]
            if rendezvous and any(each[m] > 0 == each[not m] for each, m in own[rank]):
                break
            if act == NEED:
                if min(both) < count:
                    break
            else:
                # Transfers that this rank has started and its peer has not joined.
                if in_flight is not None and sum(max(0, each[m] - each[not m]) for each, m in own[rank]) >= in_flight:
                    break
                if behind is not None and both[mine] - both[not mine] >= behind:
                    break
                both[mine] += 1
                if edge[not mine] not in ready:
                    ready.append(edge[not mine])
            at[rank] += 1
    return {rank: each[at[rank]] for rank, each in enumerate(steps) if at[rank] < len(each)}
