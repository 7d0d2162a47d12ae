"""Lifeline: every rank learns within seconds that another one has died, failed, stopped or fallen behind.

Rank 0 keeps one TCP connection to every other rank, served by a thread of each. A process that ends closes its
connection, whatever ended it; one that is stopped sends no beats. After the first such cause rank 0 asks all ranks
where they are and tells them all the same verdict. When rank 0 itself is lost, each rank comes to a verdict of its own.

    rank 1            rank 0                          rank 2 is lost
      |  at ----------> |  _beat: where ranks are        x  its connection closes (GONE), or it falls silent
      |                 |  _raise: a cause, the first counts (SILENT, LATE, FAILED, LEFT likewise)
      | <--------- ask  |  _judge: each ASK_S, until all wait or SETTLE_S have passed
      |  report ------> |
      | <----- verdict  |  _judge: one text for all
     told              told   _decide: waits are aborted, errors raised with the text

Who may connect is the business of `Door`, which closes when all ranks are in. An error of the thread's own ends neither
the thread nor the job: it is printed.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from .door import Door, Stranger, knock, own_names
from .failures import Failures

SETTLE_S = 1.5  #: seconds that ranks are given to run into the gap that a lost rank leaves
ASK_S = 0.4  #: seconds from the cause to the first question, and between questions
GONE, SILENT, LATE, FAILED, LEFT = "gone", "silent", "late", "failed", "left"
BUFFER_BYTES = 1 << 20  #: of a message that a rank has begun to send; the texts in one are cut to far less
Message = dict[str, Any]
Address = tuple[list[str], int, bytes]  #: of rank 0: its names, the port of its door, and the key to it

Args = ParamSpec("Args")
Result = TypeVar("Result")


@dataclass
class _Peer:
    sock: socket.socket
    rank: int
    heard: float = 0.0
    buffer: bytes = b""
    at: Message = field(default_factory=dict)
    report: Message | None = None


class Lifeline:
    """The connection of one rank, and its thread.

    Args:
        rank: global rank.
        world: number of ranks.
        share: gives rank 0's value to all ranks; collective.
        patience_s: seconds of silence after which a rank counts as lost.
        report: where this rank is: a dict with "waiting" (bool), "late" (bool) and what `verdict` reads; called by the
            thread.
        verdict: makes the text that all ranks are told, of the cause and the reports by rank.
        told: called by the thread with the verdict, once.
        signalled: called by the thread with the numbers of signals written to `wakeup_fd`.

    Attributes:
        failures: of batches that fail on one rank while all go on.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        share: Callable[[Address | None], Address | None],
        patience_s: float,
        report: Callable[[], Message],
        verdict: Callable[[Message, dict[int, Message]], str],
        told: Callable[[str], None],
        signalled: Callable[[bytes], None],
    ) -> None:
        self._rank = rank
        self._missing = set(range(1, world)) if rank == 0 else set()
        self._patience = patience_s
        self._interval = min(2.0, patience_s / 12)
        self._report, self._verdict, self._told, self._signalled = report, verdict, told, signalled
        self._cause: Message | None = None
        self._asked = self._caused = 0.0
        self._closed = False
        self._left: Message | None = None  # of a rank that ended without failing
        self._faults: set[str] = set()
        self.text: str | None = None
        self.decided = threading.Event()
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, _Peer] = {}
        self.failures = Failures(rank, world, lambda to, message: self._send(self._peers.get(to), {"batch": message}))
        self._wake, wake = socket.socketpair()
        self._selector.register(wake, selectors.EVENT_READ, None)
        self._woken = wake
        self._door: Door | None = None
        self._opened = time.monotonic()
        self._connect(share)
        self._wake.setblocking(False)
        self.wakeup_fd = self._wake.fileno()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="dualpipe lifeline", daemon=True).start()

    def _connect(self, share: Callable[[Address | None], Address | None]) -> None:
        master = os.environ.get("MASTER_ADDR")
        if self._rank == 0:
            if not self._missing:
                share(None)
                return
            self._door = Door(self._selector, self._enter)
            share((own_names(master), self._door.port, self._door.key))
            return
        address = share(None)
        assert address is not None
        names, port, key = address
        hosts = dict.fromkeys([*names[:1], *([master] if master else []), *names])
        self._add(_Peer(knock(hosts, port, key, self._rank, self._patience), 0))

    def _enter(self, sock: socket.socket, rank: int, rest: bytes) -> bool:
        """A rank of the job has come in at the door; each comes once."""
        if rank not in self._missing:
            return False
        self._missing.discard(rank)
        self._add(peer := _Peer(sock, rank))
        self._take(peer, rest)
        if not self._missing and self._door is not None:
            self._door.close()
        return True

    def _add(self, peer: _Peer) -> None:
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.sock.settimeout(1.0)
        peer.heard = time.monotonic()
        self._selector.register(peer.sock, selectors.EVENT_READ, peer)
        self._peers[peer.rank] = peer

    # -- called by the thread that runs the program --------------------------------------------------------------

    def fail(self, text: str, comm: bool = False, wait: bool = True) -> None:
        """Tell all ranks that this one fails.

        Args:
            text: its error.
            comm: whether a transfer failed, so that a rank that has left is the cause rather than this one.
            wait: on rank 0, return when the others have been told, as its process may end then.
        """
        if self._closed or self.text is not None:
            return
        cause = {"kind": FAILED, "rank": self._rank, "text": text[-20_000:], "comm": comm, "at": self._report()}
        if self._rank:
            self._send(self._peers.get(0), {"cause": cause})
            return
        self._raise(cause)
        self.wake()
        if wait:
            self.decided.wait(SETTLE_S + 1)

    def wake(self) -> None:
        with suppress(OSError):
            self._wake.send(b"\0")

    def close(self) -> None:
        """Leave; ranks that still wait for this one are told so."""
        if not self._closed:
            self._closed = True
            for peer in list(self._peers.values()):
                self._send(peer, {"left": True})
            self.wake()

    def close_in_child(self) -> None:
        """In a forked process: the connections are the parent's."""
        self._closed = True
        if self._door is not None:
            self._door.close_in_child()
        for sock in (self._wake, self._woken, *(peer.sock for peer in self._peers.values())):
            sock.close()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        beaten = 0.0
        while not self._closed:
            before = time.monotonic()
            events = self._guarded(self._select) or []
            now = time.monotonic()
            if now - before > self._patience / 2:  # this process itself was stopped
                self._opened = now
                for peer in self._peers.values():
                    peer.heard = now
            for key in events:
                self._guarded(self._ready, key, now)
            if now - beaten >= self._interval:
                beaten = now
                self._guarded(self._beat, now)
            if self._door is not None:
                self._guarded(self._door.sweep, now)
            if self._cause is not None and self.text is None:
                self._guarded(self._judge, now)
        self._guarded(self._finish)

    def _select(self) -> list[selectors.SelectorKey]:
        timeout = ASK_S / 2 if self._cause or (self._door is not None and self._door.busy) else self._interval
        return [key for key, _ in self._selector.select(min(timeout, self._interval))]

    def _guarded(self, part: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result | None:
        """Run a part of the thread's work. An error in it is this watch's own fault, and costs that part alone."""
        try:
            return part(*args, **kwargs)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            if not self._closed and text not in self._faults and len(self._faults) < 8:
                self._faults.add(text)
                print(
                    f"dualpipe_engine: an error in the lifeline of rank {self._rank}; training goes on\n{text}",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(0.01)  # should it fail at every turn
            return None

    def _finish(self) -> None:
        if self._door is not None:
            self._door.close()
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _ready(self, key: selectors.SelectorKey, now: float) -> None:
        if key.data is None:
            self._signalled(self._woken.recv(4096))
        elif isinstance(key.data, Door):
            key.data.accept(now)
        elif isinstance(key.data, Stranger):
            assert self._door is not None
            self._door.read(key.data)
        else:
            self._read(key.data, now)

    def _read(self, peer: _Peer, now: float) -> None:
        try:
            data = peer.sock.recv(1 << 16)
        except TimeoutError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            self._raise({"kind": GONE, "rank": peer.rank, "at": peer.at})
            return
        peer.heard = now
        self._take(peer, data)

    def _take(self, peer: _Peer, data: bytes) -> None:
        *lines, rest = (peer.buffer + data).split(b"\n")
        peer.buffer = rest if len(rest) <= BUFFER_BYTES else b""
        for line in lines:
            self._guarded(self._obey, peer, line)

    def _obey(self, peer: _Peer, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:  # the rest of a line whose beginning was not sent in time
            return
        if not isinstance(message, dict):
            return
        if "at" in message:
            peer.at = message["at"]
        elif "ask" in message:
            self._send(peer, {"report": self._report()})
        elif "report" in message:
            peer.report = message["report"]
        elif "cause" in message:
            self._raise(message["cause"])
        elif "batch" in message:
            self.failures.obey(peer.rank, message["batch"])
        elif "left" in message:
            self._drop(peer)
            self._left = self._left or {"kind": LEFT, "rank": peer.rank, "at": peer.at}
        elif "verdict" in message:
            self._decide(message["verdict"])

    def _drop(self, peer: _Peer) -> None:
        self._peers.pop(peer.rank, None)
        with suppress(KeyError, ValueError):
            self._selector.unregister(peer.sock)
        peer.sock.close()

    def _beat(self, now: float) -> None:
        at = self._guarded(self._report) or {}
        for peer in list(self._peers.values()):
            self._send(peer, {"at": at})
            if now - peer.heard > self._patience:
                self._raise({"kind": SILENT, "rank": peer.rank, "at": peer.at})
        if self._missing and now - self._opened > self._patience:
            self._raise({"kind": SILENT, "rank": min(self._missing), "at": {}})
        if at.get("late") and self._cause is None:
            late = self._left or {"kind": LATE, "rank": None, "at": {}}
            if self._rank and self._peers:
                self._send(self._peers[0], {"cause": late})
            else:
                self._raise(late)

    def _raise(self, cause: Message) -> None:
        if self._cause is None and self.text is None:
            if cause.get("comm") and self._left is not None:
                cause = self._left
            if cause["kind"] == LATE and (failed := self.failures.open()):  # which is why ranks no longer meet
                cause = {"kind": FAILED, "rank": failed.rank, "text": failed.trace, "at": {}}
            self._cause, self._caused, self._asked = cause, time.monotonic(), time.monotonic()

    def _judge(self, now: float) -> None:
        """After a cause: ask until everybody waits, then tell."""
        cause = self._cause
        assert cause is not None
        peers = [peer for peer in self._peers.values() if peer.rank != cause["rank"]]
        own = self._guarded(self._report)
        reports = {peer.rank: peer.report for peer in peers if peer.report}
        settled = len(reports) == len(peers) and all(each["waiting"] for each in reports.values())
        if now - self._caused > SETTLE_S or (self._rank == 0 and settled and now - self._caused > ASK_S):
            # Who has answered no question is not one of those that wait for somebody.
            mute = [peer for peer in peers if peer.heard < self._caused]
            if cause["rank"] is None and mute:
                stopped = min(mute, key=lambda peer: peer.heard)
                cause = {"kind": SILENT, "rank": stopped.rank, "at": stopped.at}
            if cause["rank"] != self._rank and own:
                reports[self._rank] = own
            text = self._guarded(self._verdict, cause, reports) or f"rank {cause['rank']} is lost: {cause['kind']}"
            for peer in peers:
                self._send(peer, {"verdict": text})
            self._decide(text)
        elif self._rank == 0 and now - self._asked >= ASK_S:
            self._asked = now
            for peer in peers:
                peer.report = None
                self._send(peer, {"ask": True})

    def _decide(self, text: str) -> None:
        if self.text is None:
            self.text = text
            self.decided.set()
            self._told(text)

    def _send(self, peer: _Peer | None, message: Message) -> None:
        if peer is not None:
            with self._lock, suppress(OSError):
                peer.sock.sendall(json.dumps(message).encode() + b"\n")
