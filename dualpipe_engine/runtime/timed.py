"""TimedTransport: a transport that notes when its transfers ran, and how long somebody stood still for them."""

from __future__ import annotations

import time

import torch

from ..comm.tickets import Transfer
from ..comm.transport import Ticket, Transport


class TimedTransport:
    """Wraps a transport; see `Transport`.

    Args:
        transport: does the work.
        log: takes a `Transfer` for everything that was waited for, "send" or "receive". Where the transport does not
            know when a transfer ended, only the time that was spent waiting for it counts.
    """

    def __init__(self, transport: Transport, log: list[Transfer]) -> None:
        self.rank = transport.rank
        self._transport = transport
        self._log = log

    def send(self, tensor: torch.Tensor, dst: int, tag: int) -> Ticket:
        return _Timed(self._transport.send(tensor, dst, tag), "send", tensor.nbytes, self._log)

    def recv(self, tensor: torch.Tensor, src: int, tag: int) -> Ticket:
        return _Timed(self._transport.recv(tensor, src, tag), "receive", 0, self._log)


class _Timed:
    __slots__ = ("_log", "_ticket", "_transfer")

    def __init__(self, ticket: Ticket, name: str, size: int, log: list[Transfer]) -> None:
        self._ticket, self._log = ticket, log
        self._transfer: Transfer | None = Transfer(name, time.monotonic(), size=size)

    def wait(self, timeout_s: float) -> None:
        start = time.monotonic()
        self._ticket.wait(timeout_s)
        if (transfer := self._transfer) is None:
            return
        end = time.monotonic()
        transfer.waited = end - start
        known = getattr(self._ticket, "finished_at", None)
        if known is None or (finished := known()) is None:
            transfer.posted, transfer.finished = start, end
        else:
            transfer.finished = finished
        self._log.append(transfer)
        self._transfer = None

    def done(self) -> bool:
        return self._ticket.done()
