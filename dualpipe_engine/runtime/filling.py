"""Filling: which weight gradients of a pair run in which of its waits.

Where the host sees a transfer end, weight gradients run until then. On an accelerator the host is ahead: it queues a
wait long before the device comes to it. There it goes by what events have shown of the pairs before: for each wait how
long after the computation had come to it its transfer ended, and how long each weight gradient took. In the first
pair, of which nothing is known, all that is there runs in the first wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from ..comm.tickets import Moment, Tickets

Weights = deque[Callable[[], None]]
#: Pairs that are measured one after the other, and of those after them one in so many.
FIRST, ONE_IN = 8, 32


class Filling:
    """Fills the waits of one kind of pair: of the same two stages, each time the same phases.

    Args:
        timeout_s: seconds after which a transfer is given up.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._gaps: dict[int, float] = {}  # of each wait: seconds from the computation's end to the transfer's
        self._costs: dict[int, float] = {}  # of each weight gradient: seconds
        self._pairs = self._waits = self._run = 0
        self._measured: _Measurement | None = None
        self._measuring = False

    def begin(self) -> None:
        """A pair begins."""
        if self._measured is not None and self._measured.happened():
            self._measured.into(self._gaps, self._costs)
            self._measured = None
        self._measuring = self._measured is None and (self._pairs < FIRST or self._pairs % ONE_IN == 0)
        self._pairs += 1
        self._waits = self._run = 0

    def wait(self, tickets: Tickets, weights: Weights) -> None:
        """Wait, and run weight gradients for as long as there is time; not before what leads on, whose transfers they
        would hold back."""
        if not tickets.leads_on:
            moments = tickets.moments()
            if moments:
                self._fill([end for each in moments if (end := each[1]) is not None], weights)
            while not moments and weights and not tickets.done():
                weights.popleft()()
        tickets.wait(self._timeout_s)
        if self._measuring and self._measured is not None:
            self._measured.waited()

    def _fill(self, ends: list[Moment], weights: Weights) -> None:
        """Before a wait for transfers that end at `ends`."""
        number, left = self._waits, self._gaps.get(self._waits, float("inf"))
        self._waits += 1
        if self._measuring:
            if self._measured is None:
                self._measured = _Measurement()
            self._measured.arrive(number, ends)
        while weights and left > 0:
            weights.popleft()()
            left -= self._costs.get(self._run, 0.0)
            if self._measuring and self._measured is not None:
                self._measured.ran(self._run)
            self._run += 1


class _Measurement:
    """The moments of one pair, as events of the current stream."""

    def __init__(self) -> None:
        self._origin = self._last = _now()
        self._arrived: dict[int, tuple[torch.Event, list[Moment]]] = {}
        self._ran: dict[int, tuple[torch.Event, torch.Event]] = {}

    def arrive(self, wait: int, ends: list[Moment]) -> None:
        self._last = _now()
        self._arrived[wait] = (self._last, ends)

    def ran(self, weight: int) -> None:
        start, self._last = self._last, _now()
        self._ran[weight] = (start, self._last)

    def waited(self) -> None:
        self._last = _now()  # behind the transfers' ends

    def happened(self) -> bool:
        """Whether all of its moments have."""
        return bool(self._last.query())

    def into(self, gaps: dict[int, float], costs: dict[int, float]) -> None:
        """Take the mean of what was known and what this pair shows."""
        for wait, (event, ends) in self._arrived.items():
            arrived = self._origin.elapsed_time(event) / 1e3
            for end in ends:
                _towards(gaps, wait, max(0.0, end.since(self._origin) - arrived))
        for weight, (start, stop) in self._ran.items():
            _towards(costs, weight, start.elapsed_time(stop) / 1e3)


def _now() -> torch.Event:
    event = torch.Event(torch.accelerator.current_accelerator(), enable_timing=True)
    event.record()
    return event


def _towards(known: dict[int, float], key: int, seconds: float) -> None:
    known[key] = (known[key] + seconds) / 2 if key in known else seconds
