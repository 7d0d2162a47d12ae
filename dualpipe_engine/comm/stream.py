"""The communication stream: transfers of process groups, posted in order, with tickets that count their time.

One interface, three ways to get it; `DUALPIPE_COMM` (or an argument) forces one:

    prebuilt    the C++ helper that was built at install (`dualpipe_engine._comm`)
    build       the C++ helper, built on first use and kept in torch's folder of extensions (`TORCH_EXTENSIONS_DIR`)
    python      its twin in Python (`comm.python_stream`)

Unset, they are tried in this order, and the twin comes with one warning.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Protocol

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .build import build_helper
from .device import side_stream
from .tickets import TimedTicket, Transfer

VARIABLE = "DUALPIPE_COMM"


class StreamTicket(TimedTicket, Protocol):
    """A transfer of a `CommStream`; it keeps the tensors alive until it is done.

    Attributes:
        kind: "send", "recv" or "all_to_all".
        what: how errors call it, with the rank of the peer.
        size: bytes sent; of a receive the bytes received.
        posted_ns: nanoseconds of the monotonic clock.
        finished_ns: the same; 0 until it is done. On an accelerator: when it was seen to be done; see `moments`.
        waited_ns: how long `wait` held its callers.
    """

    kind: str
    what: str
    size: int
    posted_ns: int
    finished_ns: int
    waited_ns: int


class CommStream(Protocol):
    """Posts transfers in the caller's order, without holding the GIL.

    Tensors on an accelerator travel on a high-priority stream that waits only for what made them; over gloo and MPI,
    which take CPU tensors only, through pinned host memory. Posting never raises for a lost peer: the ticket does.

    Where the process group works on the accelerator itself (NCCL), streams wait for each other and the host for none of
    them: the transfer waits for what the posting stream has been given so far, and who waits on the ticket for the
    transfer. The ticket keeps the tensors until then if the posting stream waits, which takes freed memory again only
    in its own order; else until the accelerator has finished.
    """

    def send(self, group: dist.ProcessGroup, tensor: torch.Tensor, peer: int, tag: int, what: str) -> StreamTicket:
        """Send a contiguous tensor to group rank `peer`."""

    def recv(self, group: dist.ProcessGroup, tensor: torch.Tensor, peer: int, tag: int, what: str) -> StreamTicket:
        """Receive into a contiguous tensor from group rank `peer`."""

    def all_to_all(
        self,
        group: dist.ProcessGroup,
        out: torch.Tensor,
        rows: torch.Tensor,
        receive: Sequence[int],
        send: Sequence[int],
        what: str,
        behind: bool = True,
    ) -> StreamTicket:
        """Exchange blocks of rows: `send[i]` rows to, `receive[i]` rows from group rank i.

        With `behind` False the exchange follows what this communication stream was given before, and not what the
        current stream was given: the host must have seen that `rows` are there, and the memory of `out` must be free
        whatever the current stream is doing, as memory that was allocated under another stream is.
        """

    def counters(self) -> dict[str, dict[str, int]]:
        """For each kind of ticket: posted, finished, failed, bytes, flight_ns (posted to finished), waited_ns."""

    def close(self) -> None:
        """Give up open sends and receives and end the threads."""


def open_stream(device: torch.device, how: str | None = None) -> CommStream:
    """A communication stream for tensors of a device.

    Args:
        device: of the tensors.
        how: "prebuilt", "build" or "python"; None: what `DUALPIPE_COMM` says, else the first that works.

    Raises:
        ConfigError: `how` is none of these, or what it asks for does not work; the message holds the reason.
    """
    return implementation(how or os.environ.get(VARIABLE, ""))(str(device))


class SharedStream:
    """The communication streams that all exchanges on a device go through.

    Get it by `shared_stream`, and keep it: it closes with the last reference.

    Attributes:
        posts: takes rows.
        counts: takes numbers of rows, which the host waits for, beside rows that are under way; where only the device
            has an order that they could wait in, a stream of its own.
        side: for the copy that the host reads.
    """

    def __init__(self, device: torch.device) -> None:
        self.posts = self.counts = open_stream(device)
        self.side = side_stream(device)
        weakref.finalize(self, self.posts.close)
        if device.type != "cpu":
            self.counts = open_stream(device)
            weakref.finalize(self, self.counts.close)


_SHARED: weakref.WeakValueDictionary[torch.device, SharedStream] = weakref.WeakValueDictionary()


def shared_stream(device: torch.device) -> SharedStream:
    """The stream for exchanges between ranks that share experts: one a device, however many layers have it.

    Args:
        device: of the tensors.

    Raises:
        ConfigError: as `open_stream`.
    """
    shared = _SHARED.get(device)
    if shared is None:
        shared = _SHARED[device] = SharedStream(device)
    return shared


@functools.cache
def implementation(how: str) -> Callable[[str], CommStream]:
    """The class that `open_stream` makes; "" takes the first that works."""
    ways: dict[str, Callable[[], ModuleType]] = {"prebuilt": _prebuilt, "build": build_helper, "python": _twin}
    if how and how not in ways:
        raise ConfigError(f"{VARIABLE}={how!r}: it is one of {', '.join(ways)}, or unset")
    reasons: list[str] = []
    for way in [how] if how else ways:
        if way == "python" and reasons:
            warnings.warn(f"the Python communication stream is used, for {'; '.join(reasons)}", stacklevel=3)
        try:
            return ways[way]().CommStream
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            reasons.append(f"{way}: {text.splitlines()[-1]}")
    raise ConfigError(f"no communication stream ({'; '.join(reasons)}): unset {VARIABLE} to use what works")


def _prebuilt() -> ModuleType:
    module = importlib.import_module("dualpipe_engine._comm")
    if torch.__version__.split("+")[0] != module.TORCH_VERSION:
        raise ImportError(f"dualpipe_engine._comm was built for torch {module.TORCH_VERSION}")
    return module


def _twin() -> ModuleType:
    return importlib.import_module("dualpipe_engine.comm.python_stream")


def transfer_of(ticket: StreamTicket) -> Transfer:
    """What has become of a transfer of a communication stream; named after its kind, `finished` is 0 while it runs."""
    moments = ticket.moments()
    finished = ticket.finished_at() or 0.0
    if moments is not None and moments[1] is not None:
        finished = finished or time.monotonic()
    return Transfer(ticket.kind, ticket.posted_ns * 1e-9, ticket.waited_ns * 1e-9, finished, ticket.size, moments)
