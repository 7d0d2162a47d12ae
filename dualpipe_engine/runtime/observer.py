"""Observer: when each op of the last batch ran. The executor's only profiling hook."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..schedule.op import Op
from ..schedule.timeline import Span


class Observer:
    """Records a span for each op, with the host's monotonic clock or, on an accelerator, with events of its stream.

    Args:
        rank: position in the pipeline, written into the spans.
        device: where the stages run.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._on_host = device.type == "cpu"
        self._marks: list[tuple[Op, float, float]] = []
        self._events: list[tuple[Op, torch.Event, torch.Event]] = []
        self._origin: tuple[float, torch.Event] | None = None

    def start_batch(self) -> None:
        """Forget the previous batch."""
        self._marks.clear()
        self._events.clear()
        if not self._on_host:
            torch.accelerator.synchronize()
            event = self._record()
            event.synchronize()
            self._origin = (time.monotonic(), event)

    @contextmanager
    def span(self, op: Op) -> Iterator[None]:
        """Time the body as `op`."""
        if self._on_host:
            start = time.monotonic()
            yield
            self._marks.append((op, start, time.monotonic()))
        else:
            first = self._record()
            yield
            self._events.append((op, first, self._record()))

    def spans(self) -> list[Span]:
        """Spans of the last batch; times in seconds of the host's monotonic clock."""
        if self._on_host:
            return [Span(self._rank, op, start, end) for op, start, end in self._marks]
        if self._origin is None:
            return []
        torch.accelerator.synchronize()
        zero, origin = self._origin
        return [
            Span(self._rank, op, zero + origin.elapsed_time(a) / 1e3, zero + origin.elapsed_time(b) / 1e3)
            for op, a, b in self._events
        ]

    def _record(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event
