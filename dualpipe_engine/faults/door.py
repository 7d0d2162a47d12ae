"""Door: how ranks find rank 0, and how it tells them from strangers.

Rank 0 listens on all interfaces. Who connects is sent a challenge and has 5 s to answer it with one line: an
HMAC-SHA256 under the job's key, and what it covers. Nothing of the line is read before that is right, and the key
itself is never sent. The answer to it proves that rank 0 has the key too, so that a name that leads to another machine
is noticed.
"""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from ..errors import PipelineRuntimeError

STRANGERS = 64  #: connections that have not proved to be of the job, at one time
STRANGER_S = 5.0  #: seconds that each of them is given
LINE_BYTES = 4096  #: at most, of a line before the proof
PAUSE_S = 0.5  #: seconds without new connections after one could not be taken, as when descriptors have run out
RETRY_S = 0.2  #: seconds between two attempts to reach rank 0
_DIGEST = 64  # hex digits of SHA-256
_RANK, _ZERO = b"rank", b"rank 0"  # who speaks, so that no answer can be sent back as one's own


@dataclass(eq=False)
class Stranger:
    """A connection before its proof."""

    sock: socket.socket
    challenge: bytes
    since: float
    line: bytes = b""


class Door:
    """Rank 0's side, driven by the events of a selector.

    Args:
        selector: listener and strangers are registered with it; their data is this door or a `Stranger`.
        enter: called with the socket of a proved rank, that rank, and bytes that came behind the proof; False: it is
            not wanted, and its connection is closed.
    """

    def __init__(self, selector: selectors.BaseSelector, enter: Callable[[socket.socket, int, bytes], bool]) -> None:
        self.key = secrets.token_bytes(32)
        self._selector, self._enter = selector, enter
        self._strangers: set[Stranger] = set()
        self._listener: socket.socket | None = _listener()
        self._listening = False
        self._paused_until = 0.0
        self.port: int = self._listener.getsockname()[1]
        self._listen(True)

    @property
    def open(self) -> bool:
        """Whether ranks can still come in."""
        return self._listener is not None

    @property
    def busy(self) -> bool:
        """Whether `sweep` has something to look after."""
        return bool(self._strangers) or (self.open and not self._listening)

    def accept(self, now: float) -> None:
        """Somebody knocks."""
        if self._listener is None:  # closed by an event before this one
            return
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors are left, or it has gone again: the others wait in the kernel
            self._listen(False)
            self._paused_until = now + PAUSE_S
            return
        stranger = Stranger(sock, secrets.token_hex(16).encode(), now)
        try:
            sock.setblocking(False)
            sock.send(stranger.challenge + b"\n")
            self._selector.register(sock, selectors.EVENT_READ, stranger)
        except OSError:
            sock.close()
            return
        self._strangers.add(stranger)
        self._listen(len(self._strangers) < STRANGERS)

    def read(self, stranger: Stranger) -> None:
        """A stranger has sent something."""
        try:
            data = stranger.sock.recv(LINE_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        stranger.line += data
        line, end, rest = stranger.line.partition(b"\n")
        if not data or len(line) > LINE_BYTES:
            self._drop(stranger)
        elif end:
            self._judge(stranger, line, rest)

    def sweep(self, now: float) -> None:
        """Send away who has had its time, and listen again where that was put off. Others may wait when all places
        are taken, and a rank answers at once: then a tenth of the time must do."""
        limit = STRANGER_S if len(self._strangers) < STRANGERS else STRANGER_S / 10
        for stranger in [each for each in self._strangers if now - each.since > limit]:
            self._drop(stranger)
        if self.open and not self._listening and now >= self._paused_until:
            self._listen(len(self._strangers) < STRANGERS)

    def close(self) -> None:
        """Nobody else is to come."""
        for stranger in list(self._strangers):
            self._drop(stranger)
        if self._listener is not None:
            self._listen(False)
            self._listener.close()
            self._listener = None

    def close_in_child(self) -> None:
        """In a forked process: the selector is the parent's."""
        for sock in (self._listener, *(stranger.sock for stranger in self._strangers)):
            if sock is not None:
                sock.close()

    def _judge(self, stranger: Stranger, line: bytes, rest: bytes) -> None:
        proof, payload = line[:_DIGEST], line[_DIGEST:]
        if not hmac.compare_digest(proof, _digest(self.key, _RANK, stranger.challenge + payload)):
            self._drop(stranger)
            return
        sock = self._leave(stranger)
        sock.settimeout(1.0)
        if not self._enter(sock, json.loads(payload)["rank"], rest):
            sock.close()
            return
        with suppress(OSError):  # whoever has taken the socket will see that it is broken
            sock.sendall(_digest(self.key, _ZERO, payload) + b"\n")

    def _drop(self, stranger: Stranger) -> None:
        self._leave(stranger).close()

    def _leave(self, stranger: Stranger) -> socket.socket:
        self._strangers.discard(stranger)
        with suppress(KeyError, ValueError):
            self._selector.unregister(stranger.sock)
        return stranger.sock

    def _listen(self, wanted: bool) -> None:
        if self._listener is None or wanted == self._listening:
            return
        if wanted:
            self._selector.register(self._listener, selectors.EVENT_READ, self)
        else:
            self._selector.unregister(self._listener)
        self._listening = wanted


def knock(hosts: Iterable[str], port: int, key: bytes, rank: int, patience_s: float) -> socket.socket:
    """The connection of `rank` to rank 0.

    Args:
        hosts: names and addresses of rank 0's machine; the first one that leads to rank 0 is taken.
        port: of its door.
        key: of the job.
        rank: own global rank.
        patience_s: seconds to try for.

    Raises:
        PipelineRuntimeError: rank 0 was not reached.
    """
    hosts, errors, until = list(hosts), {}, time.monotonic() + patience_s
    while True:
        for host in hosts:
            left = until - time.monotonic()
            try:
                sock = socket.create_connection((host, port), timeout=max(0.1, min(STRANGER_S, left)))
            except OSError as error:
                errors[host] = error
                continue
            try:
                _prove(sock, key, rank, max(0.1, min(2 * STRANGER_S, left)))
                return sock
            except OSError as error:
                sock.close()
                errors[host] = error
        if time.monotonic() + RETRY_S > until:
            raise PipelineRuntimeError(
                f"rank {rank} cannot reach rank 0 at port {port} of {_listed(errors)}: set MASTER_ADDR to a name or an "
                "address of rank 0's machine that all machines can reach, and let a firewall pass what the ranks send "
                "each other"
            )
        time.sleep(RETRY_S)


def own_names(master: str | None) -> list[str]:
    """What other machines may call this one: MASTER_ADDR (None: it is not set), the host's name and its addresses."""
    names = [master] if master else []
    names.append(socket.gethostname())
    with suppress(OSError):
        names += [str(info[4][0]) for info in socket.getaddrinfo(names[-1], None, type=socket.SOCK_STREAM)]
    return list(dict.fromkeys(names))


def _prove(sock: socket.socket, key: bytes, rank: int, patience_s: float) -> None:
    until = time.monotonic() + patience_s
    challenge = _line(sock, until)
    payload = json.dumps({"rank": rank, "challenge": secrets.token_hex(16)}).encode()
    sock.sendall(_digest(key, _RANK, challenge + payload) + payload + b"\n")
    if not hmac.compare_digest(_line(sock, until), _digest(key, _ZERO, payload)):
        raise OSError("what listens there is not of this job")


def _line(sock: socket.socket, until: float) -> bytes:
    """One line, and no byte of what follows."""
    line = b""
    while not line.endswith(b"\n"):
        sock.settimeout(max(0.01, until - time.monotonic()))
        data = sock.recv(1)
        if not data or len(line) > LINE_BYTES:
            raise OSError("the connection was closed" if not data else "what listens there is not of this job")
        line += data
    return line[:-1]


def _digest(key: bytes, speaker: bytes, text: bytes) -> bytes:
    return hmac.new(key, speaker + b"\0" + text, "sha256").hexdigest().encode()


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # compiled in and switched off
            listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
            listener.setblocking(False)
            return listener
    listener = socket.create_server(("", 0), backlog=4096)
    listener.setblocking(False)
    return listener


def _listed(errors: dict[str, OSError]) -> str:
    return "; ".join(f"{host} ({error})" for host, error in errors.items())
