"""Tickets: transfers that a piece of the model has posted and that somebody else will wait for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .position import waiting

if TYPE_CHECKING:
    from .stream import StreamTicket


class Ticket(Protocol):
    """A transfer under way."""

    def wait(self, timeout_s: float) -> None:
        """Return when the transfer is done (on an accelerator: when the current stream waits for it).

        Raises:
            PipelineRuntimeError: the peer was lost, or `timeout_s` seconds passed.
        """

    def done(self) -> bool:
        """Whether the transfer is finished, without waiting."""


class TimedTicket(Ticket, Protocol):
    """A ticket that knows when its transfer ended."""

    def finished_at(self) -> float | None:
        """Seconds of the monotonic clock; None while it runs, or where the host cannot know."""


@dataclass
class Transfer:
    """What became of one posted transfer; times in seconds of the monotonic clock.

    Args:
        name: of the phase that posted it.
        posted: when it was posted.
        waited: seconds that the computation stood still for it.
        finished: when it was seen to be finished, at the latest when the wait for it ended.
        size: bytes that this rank sent.
    """

    name: str
    posted: float
    waited: float = 0.0
    finished: float = 0.0
    size: int = 0

    @property
    def hidden(self) -> float:
        """Seconds of the transfer that ran under something else."""
        return max(0.0, self.finished - self.posted - self.waited)


def transfer_of(ticket: StreamTicket) -> Transfer:
    """What has become of a transfer of a communication stream; named after its kind, `finished` is 0 while it runs."""
    return Transfer(
        ticket.kind, ticket.posted_ns * 1e-9, ticket.waited_ns * 1e-9, ticket.finished_at() or 0.0, ticket.size
    )


class Tickets:
    """The open transfers of one phase of one micro-batch, forward and, later, backward.

    A communication phase is given one, posts its transfers and `add`s their tickets; the results must not be read
    before `wait`. The autograd functions of the phase keep it and add the tickets of their backward to it.

    Args:
        name: of the phase, for the overlap report.
        log: takes a `Transfer` for everything that was waited for; None: nothing is kept.
    """

    def __init__(self, name: str = "", log: list[Transfer] | None = None) -> None:
        self._name = name
        self._log = log
        self._open: list[tuple[TimedTicket, Transfer]] = []

    def add(self, ticket: TimedTicket, size: int = 0) -> None:
        """Leave `ticket`, of a transfer of `size` bytes, to `wait`."""
        self._open.append((ticket, Transfer(self._name, time.monotonic(), size=size)))

    def done(self) -> bool:
        """Whether nothing is left to wait for; does not wait."""
        for ticket, transfer in self._open:
            if not transfer.finished and ticket.done():
                transfer.finished = time.monotonic()
        return all(transfer.finished for _, transfer in self._open)

    def wait(self, timeout_s: float) -> None:
        """Return when all transfers are done (on an accelerator: when the current stream waits for them).

        Raises:
            PipelineRuntimeError: a peer was lost, or `timeout_s` seconds passed.
        """
        for ticket, transfer in self._open:
            start = time.monotonic()
            with waiting():
                ticket.wait(timeout_s)
            end = time.monotonic()
            transfer.waited = end - start
            transfer.finished = ticket.finished_at() or transfer.finished or end
            if self._log is not None:
                self._log.append(transfer)
        self._open.clear()
