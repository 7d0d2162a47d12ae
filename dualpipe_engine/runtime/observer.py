"""Observer: what a rank did in its last batch, and when. The executor's only profiling hook."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from ..comm.tickets import Transfer
from ..schedule.op import NONE, REDUCE, STEP, Op
from ..schedule.records import OP, PHASE, REDUCTION, BatchRecord, Mark
from ..schedule.timeline import Span

Instant: TypeAlias = "float | torch.Event"
"""Seconds of the host's monotonic clock or, on an accelerator, an event of the stream."""

_NO_OP = Op(STEP, NONE, NONE)


class Observer:
    """Records marks with the host's monotonic clock or, on an accelerator, with events of the stream that waits or
    computes, so that nothing is synchronized while a batch runs.

    While torch.profiler or `emit_nvtx` is active every op is a range of it, named `dualpipe 3F7`.

    Args:
        rank: position in the pipeline, written into the spans.
        device: where the stages run.

    Attributes:
        nvtx: mark ops as NVTX ranges (CUDA only).
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._on_host = device.type == "cpu"
        #: now: seconds, or an event that has been recorded on the current stream
        self.now: Callable[[], Instant] = time.monotonic if self._on_host else self._event
        self.nvtx = False
        #: context manager of an op: the body is it
        self.span: Callable[[Op], Stretch] = partial(Stretch, self, OP)
        self._profiled = False  # by torch.profiler or emit_nvtx, in this batch
        self._current: Op | None = None
        self._batch = Batch(None)

    def start_batch(self) -> None:
        """Forget the previous batch; the step begins."""
        self._profiled = torch.autograd._profiler_enabled()
        origin = None
        if not self._on_host:
            torch.accelerator.synchronize()
            event = self._event()
            event.synchronize()
            origin = (time.monotonic(), event)
        self._batch = Batch(origin)
        self._batch.start = self.now()

    def end_batch(self, transfers: Sequence[Transfer] = ()) -> Batch:
        """The step ends; returns what was recorded.

        Args:
            transfers: what became of the transfers within phases. Of those between stages the waits and hand-overs are
                marks already.
        """
        self._batch.end = self.now()
        self._batch.transfers = list(transfers)
        return self._batch

    def on_clock(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """Transfers of the last batch with all times in seconds of the host's monotonic clock; waits for the
        accelerator."""
        return self._batch.on_clock(transfers)

    def waiting(self, kind: str) -> Stretch:
        """Context manager: in the body the rank does something that is no computation, and belongs to no op.

        Args:
            kind: one of the kinds of `schedule.records`.
        """
        return Stretch(self, kind, _NO_OP)

    def waited(self, kind: str, op: Op, start: Instant) -> None:
        """The rank has done something for `op` that is no computation, from `start` (a `now()`) until now.

        Args:
            kind: one of the kinds of `schedule.records`.
            op: whose input or output it was.
        """
        self._batch.stretches.append((kind, op, start, self.now()))

    def reducing(self) -> Stretch:
        """Begin a reduction, which runs beside other things until its `stop()`, on the current stream."""
        stage = NONE if self._current is None else self._current.stage
        stretch = Stretch(self, REDUCTION, Op(REDUCE, stage, NONE))
        stretch.start = self.now()
        return stretch

    def device_done(self) -> bool:
        """Whether what was recorded has run, on the device too. Any thread may ask."""
        stretches = self._batch.stretches
        return self._on_host or not stretches or bool(stretches[-1][3].query())

    def spans(self) -> list[Span]:
        """Ops of the last batch; times in seconds of the host's monotonic clock."""
        marks = self._batch.resolve().marks
        return [Span(self._rank, mark.op, mark.start, mark.end) for mark in marks if mark.kind == OP]

    def _event(self) -> torch.Event:
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event


class Stretch:
    """Something that began and ends."""

    __slots__ = ("_observer", "_range", "kind", "op", "start")

    def __init__(self, observer: Observer, kind: str, op: Op) -> None:
        self._observer, self.kind, self.op = observer, kind, op
        self.start: Instant = 0.0
        self._range: Any = None

    def stop(self) -> None:
        """It ends now."""
        self._observer.waited(self.kind, self.op, self.start)

    def __enter__(self) -> None:
        observer = self._observer
        if self.kind == OP:
            observer._current = self.op
            if observer._profiled:
                self._range = torch.profiler.record_function(f"dualpipe {self.op}")
                self._range.__enter__()
            elif observer.nvtx:
                torch.cuda.nvtx.range_push(f"dualpipe {self.op}")
                self._range = _NvtxRange
        self.start = observer.now()

    def __exit__(self, *error: object) -> None:
        observer = self._observer
        observer._batch.stretches.append((self.kind, self.op, self.start, observer.now()))
        if self._range is not None:
            self._range.__exit__(*error)
        if self.kind == OP:
            observer._current = None


class _NvtxRange:
    @staticmethod
    def __exit__(*error: object) -> None:
        torch.cuda.nvtx.range_pop()


class Batch:
    """What an observer recorded of one batch, on an accelerator still as events.

    Args:
        origin: seconds of the host's monotonic clock, and an event of the same moment; None on the host.
    """

    def __init__(self, origin: tuple[float, torch.Event] | None) -> None:
        self._origin = origin
        self.stretches: list[tuple[str, Op, Any, Any]] = []
        self.start: Instant | None = None
        self.end: Instant | None = None
        self.transfers: list[Transfer] = []

    def resolve(self) -> BatchRecord:
        """The record in seconds of the host's monotonic clock; waits for the accelerator."""
        transfers = self.on_clock(self.transfers)
        marks = [Mark(kind, op, self._seconds(start), self._seconds(end)) for kind, op, start, end in self.stretches]
        marks += [Mark(PHASE, _NO_OP, t.posted, t.finished, t.name, t.waited) for t in transfers]
        start = 0.0 if self.start is None else self._seconds(self.start)
        return BatchRecord(start, start if self.end is None else self._seconds(self.end), marks)

    def on_clock(self, transfers: Sequence[Transfer]) -> list[Transfer]:
        """See `Observer.on_clock`."""
        if self._origin is not None:
            torch.accelerator.synchronize()
        return [transfer.resolved(self._origin) for transfer in transfers]

    def _seconds(self, moment: Instant) -> float:
        if isinstance(moment, (int, float)):
            return float(moment)
        assert self._origin is not None
        zero, event = self._origin
        return zero + float(event.elapsed_time(moment)) / 1e3
