"""Lifeline: every rank learns within seconds that another one has died, failed, stopped or fallen behind.

Rank 0 keeps one TCP connection to every other rank, served by a thread of each. A process that ends closes its
connection, whatever ended it; one that is stopped sends no beats. After the first such cause rank 0 asks all ranks
where they are and tells them all the same verdict. When rank 0 itself is lost, each rank comes to a verdict of its own.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

SETTLE_S = 1.5  #: seconds that ranks are given to run into the gap that a lost rank leaves
ASK_S = 0.4  #: seconds from the cause to the first question, and between questions
GONE, SILENT, LATE, FAILED, LEFT = "gone", "silent", "late", "failed", "left"
Message = dict[str, Any]


@dataclass
class _Peer:
    sock: socket.socket
    rank: int = -1
    heard: float = 0.0
    buffer: bytes = b""
    at: Message = field(default_factory=dict)
    report: Message | None = None


class Lifeline:
    """The connection of one rank, and its thread.

    Args:
        rank: global rank.
        share: gives rank 0's value to all ranks; collective.
        patience_s: seconds of silence after which a rank counts as lost.
        report: where this rank is: a dict with "waiting" (bool), "late" (bool) and what `verdict` reads; called by the
            thread.
        verdict: makes the text that all ranks are told, of the cause and the reports by rank.
        told: called by the thread with the verdict, once.
        signalled: called by the thread with the numbers of signals written to `wakeup_fd`.
    """

    def __init__(
        self,
        rank: int,
        share: Callable[[Any], Any],
        patience_s: float,
        report: Callable[[], Message],
        verdict: Callable[[Message, dict[int, Message]], str],
        told: Callable[[str], None],
        signalled: Callable[[bytes], None],
    ) -> None:
        self._rank = rank
        self._patience = patience_s
        self._interval = min(2.0, patience_s / 12)
        self._report, self._verdict, self._told, self._signalled = report, verdict, told, signalled
        self._cause: Message | None = None
        self._asked = self._caused = 0.0
        self._closed = False
        self._left: Message | None = None  # of a rank that ended without failing
        self.text: str | None = None
        self.decided = threading.Event()
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, _Peer] = {}
        self._wake, wake = socket.socketpair()
        self._selector.register(wake, selectors.EVENT_READ, None)
        self._woken = wake
        self._listener: socket.socket | None = None
        self._connect(share)
        self._wake.setblocking(False)
        self.wakeup_fd = self._wake.fileno()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="dualpipe lifeline", daemon=True).start()

    def _connect(self, share: Callable[[Any], Any]) -> None:
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        if self._rank == 0:
            family = socket.getaddrinfo(host, 0)[0][0]
            try:
                self._listener = socket.create_server((host, 0), family=family, backlog=4096)
            except OSError:  # the name leads here by another address
                self._listener = socket.create_server(("", 0), family=family, backlog=4096)
            self._key = secrets.token_hex(16)
            share((host, self._listener.getsockname()[1], self._key))
            self._selector.register(self._listener, selectors.EVENT_READ, self._listener)
            return
        host, port, self._key = share(None)
        sock = socket.create_connection((host, port), timeout=self._patience)
        self._add(sock, 0)
        self._send(self._peers[0], {"rank": self._rank, "key": self._key})

    def _add(self, sock: socket.socket, rank: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(1.0)
        peer = _Peer(sock, rank, time.monotonic())
        self._selector.register(sock, selectors.EVENT_READ, peer)
        if rank >= 0:
            self._peers[rank] = peer

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
        for sock in (self._listener, self._wake, self._woken, *(peer.sock for peer in self._peers.values())):
            if sock is not None:
                sock.close()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        beaten = 0.0
        while not self._closed:
            before = time.monotonic()
            events = self._selector.select(ASK_S / 2 if self._cause else self._interval)
            now = time.monotonic()
            if now - before > self._patience / 2:  # this process itself was stopped
                for peer in self._peers.values():
                    peer.heard = now
            for key, _ in events:
                self._ready(key, now)
            if now - beaten >= self._interval:
                beaten = now
                self._beat(now)
            if self._cause is not None and self.text is None:
                self._judge(now)
        self._finish()

    def _finish(self) -> None:
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _ready(self, key: Any, now: float) -> None:
        if key.data is None:
            self._signalled(self._woken.recv(4096))
        elif key.data is self._listener:
            assert self._listener is not None
            self._add(self._listener.accept()[0], -1)
        else:
            self._read(key.data, now)

    def _read(self, peer: _Peer, now: float) -> None:
        try:
            data = peer.sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._drop(peer)
            if peer.rank >= 0:
                self._raise({"kind": GONE, "rank": peer.rank, "at": peer.at})
            return
        peer.heard = now
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        for line in lines:
            self._take(peer, json.loads(line))

    def _take(self, peer: _Peer, message: Message) -> None:
        if peer.rank < 0:
            if message.get("key") != self._key:
                self._drop(peer)
                return
            peer.rank = message["rank"]
            self._peers[peer.rank] = peer
        elif "at" in message:
            peer.at = message["at"]
        elif "ask" in message:
            self._send(peer, {"report": self._report()})
        elif "report" in message:
            peer.report = message["report"]
        elif "cause" in message:
            self._raise(message["cause"])
        elif "left" in message:
            self._drop(peer)
            self._left = self._left or {"kind": LEFT, "rank": peer.rank, "at": peer.at}
        elif "verdict" in message:
            self._decide(message["verdict"])

    def _drop(self, peer: _Peer) -> None:
        self._peers.pop(peer.rank, None)
        self._selector.unregister(peer.sock)
        peer.sock.close()

    def _beat(self, now: float) -> None:
        at = self._report()
        for peer in list(self._peers.values()):
            self._send(peer, {"at": at})
            if now - peer.heard > self._patience:
                self._raise({"kind": SILENT, "rank": peer.rank, "at": peer.at})
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
            self._cause, self._caused, self._asked = cause, time.monotonic(), time.monotonic()

    def _judge(self, now: float) -> None:
        """After a cause: ask until everybody waits, then tell."""
        cause = self._cause
        assert cause is not None
        peers = [peer for peer in self._peers.values() if peer.rank != cause["rank"]]
        own = self._report()
        reports = {peer.rank: peer.report for peer in peers if peer.report}
        settled = len(reports) == len(peers) and all(each["waiting"] for each in reports.values())
        if now - self._caused > SETTLE_S or (self._rank == 0 and settled and now - self._caused > ASK_S):
            if cause["rank"] != self._rank:
                reports[self._rank] = own
            text = self._verdict(cause, reports)
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
