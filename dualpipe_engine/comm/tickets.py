"""Tickets: transfers that a piece of the model has posted and that somebody else will wait for."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ..schedule.progress import waiting

if TYPE_CHECKING:
    import torch


class Ticket(Protocol):
    """A transfer under way."""

    def wait(self, timeout_s: float) -> None:
        """Return when the transfer is done.

        On an accelerator: let the current stream wait for it and return at once; what is late there is for the
        lifeline to find, and `timeout_s` counts only for transfers that go through host memory.

        Raises:
            PipelineRuntimeError: the peer was lost, or `timeout_s` seconds passed.
        """

    def done(self) -> bool:
        """Whether the transfer is finished, without waiting."""


class Moment(Protocol):
    """An instant on a stream of an accelerator."""

    def since(self, earlier: torch.Event) -> float:
        """Seconds since an event that has been recorded with timing; both must have happened."""


Moments = tuple[Moment, Moment | None, Moment | None, Moment | None]
"""Of a transfer: posted, finished, the waiting stream stood still, it went on."""


class TimedTicket(Ticket, Protocol):
    """A ticket that knows when its transfer ended."""

    def finished_at(self) -> float | None:
        """Seconds of the monotonic clock; None while it runs, or where the host cannot know."""

    def moments(self) -> Moments | None:
        """Where host times mean nothing, because the host only queues the transfer: the times on the device."""


@dataclass
class Transfer:
    """What became of one posted transfer; times in seconds of the monotonic clock.

    Args:
        name: of the phase that posted it.
        posted: when it was posted.
        waited: seconds that the computation stood still for it.
        finished: when it was seen to be finished, at the latest when the wait for it ended.
        size: bytes that this rank sent.
        moments: on accelerators what the times are made of; see `resolved`.
    """

    name: str
    posted: float
    waited: float = 0.0
    finished: float = 0.0
    size: int = 0
    moments: Moments | None = None

    @property
    def hidden(self) -> float:
        """Seconds of the transfer that ran under something else."""
        return max(0.0, self.finished - self.posted - self.waited)

    def resolved(self, origin: tuple[float, torch.Event] | None) -> Transfer:
        """The same with times of the device on the host's clock, once the device has finished.

        Args:
            origin: seconds of the host's monotonic clock, and a timed event of the same moment; None on the CPU.
        """
        if self.moments is None or origin is None:
            return self
        zero, event = origin
        posted, finished, stopped, resumed = self.moments
        waited = 0.0 if stopped is None or resumed is None else max(0.0, resumed.since(event) - stopped.since(event))
        start = zero + posted.since(event)
        # A receive or a send that nobody had to wait for has no event behind it: when the host saw its end must do.
        end = self.finished if finished is None else zero + finished.since(event)
        return replace(self, posted=start, waited=waited, finished=max(start, end), moments=None)


class Tickets:
    """The open transfers of one phase of one micro-batch, forward and, later, backward.

    A communication phase is given one, posts its transfers and `add`s their tickets; the results must not be read
    before `wait`. The autograd functions of the phase keep it and add the tickets of their backward to it.

    Args:
        name: of the phase, for the overlap report.
        log: takes a `Transfer` for everything that was waited for; None: nothing is kept.
        leads_on: whether the phase is followed by communication, for which the host needs what it brings.
    """

    def __init__(self, name: str = "", log: list[Transfer] | None = None, leads_on: bool = False) -> None:
        self._name = name
        self._log = log
        self._open: list[tuple[TimedTicket, Transfer]] = []
        self.leads_on = leads_on

    def add(self, ticket: TimedTicket, size: int = 0) -> None:
        """Leave `ticket`, of a transfer of `size` bytes, to `wait`."""
        self._open.append((ticket, Transfer(self._name, time.monotonic(), size=size)))

    def moments(self) -> list[Moments]:
        """Of the transfers whose times are those of a device, as far as they are known."""
        return [found for ticket, _ in self._open if (found := ticket.moments()) is not None]

    @property
    def by_host(self) -> bool:
        """Whether anything is open of which the host itself sees the end, as on the CPU."""
        return bool(self._open) and not self.moments()

    def done(self) -> bool:
        """Whether nothing is left to wait for; does not wait."""
        for ticket, transfer in self._open:
            if not transfer.finished and ticket.done():
                transfer.finished = time.monotonic()
        return all(transfer.finished for _, transfer in self._open)

    def wait(self, timeout_s: float) -> None:
        """Wait for all transfers; see `Ticket.wait`.

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
                transfer.moments = ticket.moments()
                self._log.append(transfer)
        self._open.clear()
