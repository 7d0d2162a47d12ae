"""The hub of the strict twin: it carries all messages of all ranks, by NCCL's rules, and knows who waits for what.

Rules:
- a communicator has no tags: it is one queue on each of its ranks, and only the heads of queues can meet. The k-th send
  of a rank meets the k-th receive of its peer, and what cannot meet holds all behind it;
- eager: a group is made by all ranks of the world, each call of each rank the same (`ncclCommSplit`);
- lazy: the first operation of a communicator holds the host until all of its ranks have posted one;
- a match takes a short while, drawn from a seed.

Where every rank waits and nothing is on its way, all ranks are told who called what, at once.
"""

from __future__ import annotations

import contextlib
import heapq
import random
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Listener, wait
from typing import Any

QUIET_S = 120.0  #: without a message while a rank waits here and others wait elsewhere, or are kept from computing
DONE, MADE, FAULT, CONNECTED = "done", "made", "fault", "connected"


@dataclass
class _Op:
    rank: int
    number: int
    kind: str  # "send", "recv" or a collective
    detail: Any  # the peer's global rank, or what must be the same on all ranks
    payload: bytes | None
    meeting: bool = False

    def __str__(self):
        return f"{self.kind} {self.detail}"


@dataclass
class _Communicator:
    name: str
    members: tuple[int, ...]
    queues: dict[int, deque[_Op]] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)  # ranks that have posted
    shut: set[int] = field(default_factory=set)  # ranks that have given it back


@dataclass
class _Rank:
    connection: Any
    makes: list[Any] = field(default_factory=list)
    calls: deque[str] = field(default_factory=lambda: deque(maxlen=4))
    blocked: str | None = None  # what the host waits for
    awaits: Any = None  # the operation, group or communicator that ends it
    ended: bool = False


class Hub:
    """Serves a world of `size` ranks until `close`.

    Args:
        size: ranks.
        eager: which rule of making groups holds.
        seed: of the delays.
        delay_s: the longest.

    Attributes:
        address: for `backend.install`.
        faults: what was reported.
        communicators: most that were alive at once, the world's included.
    """

    def __init__(self, size: int, eager: bool = True, seed: int = 0, delay_s: float = 1e-3) -> None:
        self._size, self._eager, self._delay = size, eager, delay_s
        self._random = random.Random(seed)
        self._listener = Listener(family="AF_UNIX")
        self.address = self._listener.address
        self.faults: list[str] = []
        self.communicators = 0
        self._ranks: dict[int, _Rank] = {}
        self._communicators: dict[str, _Communicator] = {}
        self._pending: list[tuple[float, int, _Communicator, list[_Op]]] = []
        self._matches = 0
        self._closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._thread.join(10)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        self._listener._listener._socket.settimeout(0.2)
        while len(self._ranks) < self._size and not self._closing:
            with contextlib.suppress(TimeoutError):
                connection = self._listener.accept()
                self._ranks[connection.recv()] = _Rank(connection)
        by_connection = {id(each.connection): number for number, each in self._ranks.items()}
        for each in self._ranks.values():
            each.connection.send((CONNECTED, None, None))
        open_ = [each.connection for each in self._ranks.values()]
        heard = time.monotonic()
        while open_ and not self._closing:
            now = time.monotonic()
            until = self._pending[0][0] - now if self._pending else 0.2
            for connection in wait(open_, max(0.0, min(until, 0.2))):
                heard = time.monotonic()
                try:
                    self._take(by_connection[id(connection)], *connection.recv())
                except (EOFError, OSError):
                    open_.remove(connection)
                    self._end(by_connection[id(connection)])
                except Exception:
                    self._fault(traceback.format_exc())
            while self._pending and self._pending[0][0] <= time.monotonic():
                self._complete(*heapq.heappop(self._pending)[2:])
            self._look(time.monotonic() - heard)
        for each in self._ranks.values():
            each.connection.close()
        self._listener.close()

    def _take(self, rank: int, what: str, *rest: Any) -> None:
        me = self._ranks[rank]
        if what == "make":
            name, members = rest
            me.makes.append((name, tuple(members)))
            me.calls.append(f"makes group {list(members)}")
            if self._eager:
                me.blocked, me.awaits = f"makes group {list(members)}", ("make", len(me.makes))
                self._compare_makes(len(me.makes) - 1)
            else:
                self._send(rank, MADE, len(me.makes), None)
        elif what == "open":
            name, members = rest
            self._communicators.setdefault(name, _Communicator(name, tuple(members)))
            self.communicators = max(self.communicators, len(self._communicators))
        elif what == "shut":
            communicator = self._communicators.get(rest[0])
            if communicator is not None:
                communicator.shut.add(rank)
                if communicator.shut.issuperset(communicator.members):
                    del self._communicators[rest[0]]
        elif what == "post":
            self._post(rank, *rest)
        elif what == "wait":
            number, text = rest
            if any(op.number == number for each in self._communicators.values() for op in each.queues.get(rank, ())):
                me.blocked, me.awaits = text, number
        elif what == "full":
            number, text = rest
            if sum(len(each.queues.get(rank, ())) for each in self._communicators.values()) == number:
                me.blocked, me.awaits = text, "any"
        elif what == "fault":
            self._fault(f"rank {rank}: {rest[0]}")
        elif what == "bye":
            self._end(rank)

    def _end(self, rank: int) -> None:
        self._ranks[rank].ended = True
        self._ranks[rank].blocked = "has ended"

    def _compare_makes(self, index: int) -> None:
        calls = {rank: each.makes[index][1] for rank, each in self._ranks.items() if len(each.makes) > index}
        if len(set(calls.values())) > 1:
            self._fault(f"call {index} that makes a group differs between ranks")
        elif len(calls) == self._size:
            for rank, each in self._ranks.items():
                each.blocked = each.awaits = None
                self._send(rank, MADE, index + 1, None)

    def _post(self, rank: int, name: str, number: int, kind: str, detail: Any, payload: bytes | None) -> None:
        me = self._ranks[rank]
        communicator = self._communicators[name]
        op = _Op(rank, number, kind, detail, payload)
        me.calls.append(f"{op} on {_called(communicator)}")
        first = rank not in communicator.seen
        communicator.seen.add(rank)
        communicator.queues.setdefault(rank, deque()).append(op)
        if first and not self._eager:
            me.blocked, me.awaits = f"first operation, {op} on {_called(communicator)}", ("connect", name)
            if communicator.seen.issuperset(communicator.members):
                for member in communicator.members:
                    if self._ranks[member].awaits == ("connect", name):
                        self._ranks[member].blocked = self._ranks[member].awaits = None
                    self._send(member, CONNECTED, name, None)
        self._match(communicator)

    def _match(self, communicator: _Communicator) -> None:
        if not self._eager and not communicator.seen.issuperset(communicator.members):
            return
        heads = {rank: queue[0] for rank, queue in communicator.queues.items() if queue and not queue[0].meeting}
        for rank, op in heads.items():
            other = heads.get(op.detail) if op.kind == "send" else None
            if other is not None and other.kind == "recv" and other.detail == rank:
                if other.payload != op.payload[1]:
                    self._fault(f"rank {rank} sends {op.payload[1]} bytes, rank {other.rank} receives {other.payload}")
                self._meet(communicator, [op, other])
        collectives = [heads.get(member) for member in communicator.members]
        if all(op is not None and op.kind not in ("send", "recv") for op in collectives):
            if len({(op.kind, op.detail) for op in collectives}) == 1:
                self._meet(communicator, collectives)
            else:
                calls = "; ".join(f"rank {op.rank} {op}" for op in collectives)
                self._fault(f"heads of {_called(communicator)} cannot meet: {calls}")

    def _meet(self, communicator: _Communicator, ops: list[_Op]) -> None:
        for op in ops:
            op.meeting = True
        self._matches += 1
        late = self._random.random() ** 4 * self._delay
        heapq.heappush(self._pending, (time.monotonic() + late, self._matches, communicator, ops))

    def _complete(self, communicator: _Communicator, ops: list[_Op]) -> None:
        for op in ops:
            communicator.queues[op.rank].popleft()
            me = self._ranks[op.rank]
            if op.kind == "recv":
                result: Any = ops[0].payload[0]
            else:
                result = None if op.kind == "send" else [each.payload for each in ops]
            if me.awaits == op.number or me.awaits == "any":
                me.blocked = me.awaits = None
            self._send(op.rank, DONE, op.number, result)
        self._match(communicator)

    def _look(self, quiet: float) -> None:
        """Report a world that stands still."""
        live = [each for each in self._ranks.values() if not each.ended]
        waiting = [each for each in live if each.blocked]
        if not waiting or self._pending or self.faults:
            return
        if len(waiting) == len(live) or quiet > QUIET_S:
            self._fault("all ranks wait" if len(waiting) == len(live) else f"nothing has moved for {QUIET_S:.0f} s")

    def _fault(self, text: str) -> None:
        lines = [
            f"  rank {rank}: {each.blocked or 'runs'}; last calls: {', '.join(each.calls)}"
            for rank, each in sorted(self._ranks.items())
        ]
        for communicator in self._communicators.values():
            heads = [f"rank {rank} {q[0]} and {len(q) - 1} more" for rank, q in communicator.queues.items() if q]
            if heads:
                lines.append(f"  {_called(communicator)}: {'; '.join(heads)}")
        self.faults.append("\n".join([text, *lines]))
        for rank in self._ranks:
            self._send(rank, FAULT, None, self.faults[-1])

    def _send(self, rank: int, *message: Any) -> None:
        with contextlib.suppress(OSError):
            self._ranks[rank].connection.send(message)


def _called(communicator: _Communicator) -> str:
    return f"communicator {communicator.name} of {list(communicator.members)}"
