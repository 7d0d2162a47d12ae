"""The Python twin of the C++ communication stream (csrc/); the interface is in comm/stream.py."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import PipelineRuntimeError
from .device import EventMoment, on_stream

LOOK_NS = 40_000_000  #: a send that is older is late: its memory could be free
_HELD = 8 << 20  #: or where those of one edge hold more bytes
_UNASKED_NS = 1_000_000_000  #: a receive is late only if nobody seems to want it
_IDLE_LOOKS = 10  #: in a row with nothing to do, then the watcher sleeps until the next post
_FOREVER = timedelta(days=365)
_CLOSED = "the communication stream was closed"

#: Posts a transfer, given where it receives to and what it sends, None for the one it has not.
_Launch = Callable[..., dist.Work]
_LaneKey = tuple[str, dist.ProcessGroup, int]  #: kind, group, rank of the peer in it


class PythonTicket:
    """See `comm.stream.StreamTicket`."""

    def __init__(
        self, kind: str, what: str, size: int, sums: dict[str, int], kept: tuple[torch.Tensor | None, ...]
    ) -> None:
        self.kind, self.what, self.size = kind, what, size
        self.posted_ns = time.monotonic_ns()
        self.finished_ns = self.waited_ns = 0
        self.native = False  # the process group works on the accelerator's streams by itself
        self.poster: Any = None  # of a native transfer: the stream whose op made `kept`, and may take the memory again
        self.posted: EventMoment | None = None
        self.ended: EventMoment | None = None
        self.stopped: EventMoment | None = None
        self.resumed: EventMoment | None = None
        self.by_callback = False  # the process group calls `complete`
        self.work: Any = None
        self._kept: Any = kept
        self._land: Callable[[], torch.Event] | None = None
        self._landed: torch.Event | None = None
        self._error: str | None = None
        self._sums = sums
        self._claim = threading.Lock()
        self._lock = threading.Lock()
        self._done = threading.Event()
        sums["posted"] += 1

    def stage(self, land: Callable[[], torch.Event]) -> None:
        """Call `land` when the transfer is done; it copies to the accelerator and returns the event behind that."""
        self._land = land

    def take(self) -> bool:
        """True for the one thread that may wait for the work: gloo hands out each completion once."""
        return self._claim.acquire(blocking=False)

    def taken(self) -> bool:
        return self._claim.locked()

    def finish(self, timeout: timedelta) -> None:
        """Wait for the work itself; call it after `take`."""
        error, kept, work = None, self._kept, self.work  # `close` drops what gloo may still write to
        try:
            if not work.wait(timeout):
                error = "it was given up"
        except RuntimeError as raised:
            error = str(raised)
        self.complete(error)
        del kept

    def complete(self, error: str | None) -> None:
        with self._lock:
            if self._done.is_set():
                return
            self.take()
            if error is None and self._land is not None:
                self._landed = self._land()
            self._error = error
            self._kept = self._land = self.work = None
            self.finished_ns = time.monotonic_ns()
            self._sums["flight_ns"] += self.finished_ns - self.posted_ns
            self._sums["bytes"] += self.size
            self._sums["finished" if error is None else "failed"] += 1
            self._done.set()

    def wait(self, timeout_s: float) -> None:
        start = time.monotonic_ns()
        try:
            self._wait(timeout_s)
        finally:
            stood = time.monotonic_ns() - start
            self.waited_ns += stood
            self._sums["waited_ns"] += stood

    def _wait(self, timeout_s: float) -> None:
        if self.native:
            try:
                self._wait_on_device()
            except RuntimeError as error:
                self.complete(str(error))
        elif not self.by_callback and self.take():
            self.finish(timedelta(seconds=timeout_s))
        elif not self._done.wait(timeout_s):
            raise PipelineRuntimeError(f"{self.what} failed: not done in {timeout_s} s")
        if self._error is not None:
            raise PipelineRuntimeError(f"{self.what} failed: {self._error}")
        if self._landed is not None:
            self._landed.wait()

    def _wait_on_device(self) -> None:
        """Order the current stream behind the transfer; see `Ticket::wait_on_device` in csrc/ticket.cpp."""
        work = self.work
        if work is None:
            return
        current = torch.accelerator.current_stream(self.poster.device)
        stopped = EventMoment(current)
        work.wait()
        resumed = EventMoment(current)
        with self._lock:
            if self.stopped is None:
                self.stopped, self.resumed = stopped, resumed
            self.ended = self.ended or resumed
            if current == self.poster:
                self._kept = None

    def moments(self) -> tuple[EventMoment | None, ...] | None:
        return None if self.posted is None else (self.posted, self.ended, self.stopped, self.resumed)

    def done(self) -> bool:
        work = self.work
        if self.native and work is not None and work.is_completed():
            self.complete(None)
        return self._done.is_set()

    def finished_at(self) -> float | None:
        return self.finished_ns * 1e-9 if self.finished_ns else None


class _Lane:
    """Waits for the transfers of one kind over one directed edge that are late; see `Lane` in csrc/stream.h."""

    def __init__(self) -> None:
        self._queue: deque[PythonTicket] = deque()
        self._held = 0  # bytes in the queue
        self._changed = threading.Condition()
        self._current: PythonTicket | None = None
        self._thread: threading.Thread | None = None
        self._working = self._closing = False

    def add(self, ticket: PythonTicket) -> None:
        with self._changed:
            self._held += ticket.size
            self._queue.append(ticket)
            self._start_if_late()

    def look_after(self) -> bool:
        """Set the thread to work where it is needed; returns whether anything is left to look after."""
        with self._changed:
            self._start_if_late()
            return self._working or bool(self._queue)

    def _start_if_late(self) -> None:
        if self._working or not self._drop_taken() or not self._late():
            return
        self._working = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="dualpipe-lane")
            self._thread.start()
        self._changed.notify()

    def _late(self) -> bool:
        first = self._queue[0]
        age = time.monotonic_ns() - first.posted_ns
        return age > _UNASKED_NS if first.kind == "recv" else self._held > _HELD or age > LOOK_NS

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
            unfinished = [self._current, *self._queue]
        # Python cannot end a wait for gloo; its thread is a daemon.
        for ticket in unfinished:
            if ticket is not None and (ticket is self._current or ticket.take()):
                ticket.complete(_CLOSED)

    def _drop_taken(self) -> bool:
        while self._queue and self._queue[0].taken():
            self._pop()
        return bool(self._queue)

    def _pop(self) -> PythonTicket:
        ticket = self._queue.popleft()
        self._held -= ticket.size
        return ticket

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                if not self._drop_taken():
                    self._working = False
                self._changed.wait_for(lambda: self._closing or self._working)
                if self._closing:
                    return
                if not self._drop_taken():
                    continue
                self._current = ticket = self._pop()
            if ticket.take():
                ticket.finish(_FOREVER)
            del ticket


class CommStream:
    """See `comm.stream.CommStream`."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream: Any = None
        if self._device.type != "cpu":
            self._stream = torch.Stream(self._device, priority=-1)
            self._device = self._stream.device
        names = ("posted", "finished", "failed", "bytes", "flight_ns", "waited_ns")
        self._sums = {kind: dict.fromkeys(names, 0) for kind in ("send", "recv", "all_to_all")}
        self._lanes: dict[_LaneKey, _Lane] = {}
        self._native: deque[PythonTicket] = deque()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._watching = False
        self._watcher: threading.Thread | None = None

    def send(self, group: dist.ProcessGroup, tensor: torch.Tensor, peer: int, tag: int, what: str) -> PythonTicket:
        return self._post("send", group, tensor, None, peer, what, lambda to, rows: group.send([rows], peer, tag))

    def recv(self, group: dist.ProcessGroup, tensor: torch.Tensor, peer: int, tag: int, what: str) -> PythonTicket:
        return self._post("recv", group, None, tensor, peer, what, lambda to, rows: group.recv([to], peer, tag))

    def all_to_all(
        self,
        group: dist.ProcessGroup,
        out: torch.Tensor,
        rows: torch.Tensor,
        receive: Sequence[int],
        send: Sequence[int],
        what: str,
        behind: bool = True,
    ) -> PythonTicket:
        def launch(to: torch.Tensor, rows: torch.Tensor) -> dist.Work:
            post: _Launch = getattr(group, "all_to_all_single", None) or group.alltoall_base  # renamed in torch 2.13
            return post(to, rows, list(receive), list(send))

        return self._post("all_to_all", group, rows, out, -1, what, launch, behind)

    def counters(self) -> dict[str, dict[str, int]]:
        return {kind: dict(sums) for kind, sums in self._sums.items()}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            lanes, self._lanes = self._lanes, {}
            self._changed.notify()
        for lane in lanes.values():
            lane.close()

    def _post(
        self,
        kind: str,
        group: dist.ProcessGroup,
        rows: torch.Tensor | None,
        out: torch.Tensor | None,
        peer: int,
        what: str,
        launch: _Launch,
        behind: bool = True,
    ) -> PythonTicket:
        counted = out if rows is None else rows
        assert counted is not None
        ticket = PythonTicket(kind, what, counted.nbytes, self._sums[kind], (rows, out))
        with self._lock, torch.no_grad():
            try:
                if self._closed:
                    raise RuntimeError(_CLOSED)
                if counted.device.type == "cpu":
                    ticket.work = launch(out, rows)
                else:
                    ticket.work = self._launch_on_stream(ticket, group, rows, out, launch, behind)
            except RuntimeError as error:
                ticket.complete(str(error))
                return ticket
            if ticket.native:
                while self._native and self._native[0].done():
                    self._native.popleft()
                self._native.append(ticket)
            elif kind == "all_to_all":
                ticket.by_callback = True
                ticket.work.get_future().add_done_callback(lambda future: ticket.complete(_error_of(future)))
            else:
                self._keep((kind, group, peer), ticket)
        return ticket

    def _keep(self, key: _LaneKey, ticket: PythonTicket) -> None:
        if key not in self._lanes:
            self._lanes[key] = _Lane()
        self._lanes[key].add(ticket)
        if self._watching:
            return
        self._watching = True
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, daemon=True, name="dualpipe-watcher")
            self._watcher.start()
        self._changed.notify()

    def _watch(self) -> None:
        """Look after the lanes every now and then while there are transfers; so posting wakes nobody."""
        idle = 0
        with self._changed:
            while not self._closed:
                busy = [lane.look_after() for lane in self._lanes.values()]
                idle = 0 if any(busy) else idle + 1
                if idle < _IDLE_LOOKS:
                    self._changed.wait_for(lambda: self._closed, LOOK_NS * 1e-9)
                else:
                    self._watching = False
                    self._changed.wait_for(lambda: self._closed or self._watching)
                    idle = 0

    def _launch_on_stream(
        self,
        ticket: PythonTicket,
        group: dist.ProcessGroup,
        rows: torch.Tensor | None,
        out: torch.Tensor | None,
        launch: _Launch,
        behind: bool,
    ) -> dist.Work:
        stream = self._stream
        current = torch.accelerator.current_stream(self._device)
        produced = EventMoment(current if behind else stream)
        if behind:
            produced.block(stream)
        else:
            assert out is not None
            out.record_stream(stream)
            out.record_stream(current)
        ticket.native = dist.get_backend(group) not in ("gloo", "mpi")
        if ticket.native:
            ticket.poster, ticket.posted = current, produced
        with on_stream(stream):
            if ticket.native:
                work = launch(out, rows)
                if ticket.kind == "all_to_all":  # as in csrc/stream.cpp
                    work.wait()
                    ticket.ended = EventMoment(stream)
                return work
            host_rows = None
            if rows is not None:
                host_rows = torch.empty_like(rows, device="cpu", pin_memory=True)
                host_rows.copy_(rows, non_blocking=True)
                stream.record_event().synchronize()
        if out is None:
            return launch(None, host_rows)
        host_out = torch.empty_like(out, device="cpu", pin_memory=True)

        def land() -> torch.Event:
            with torch.no_grad(), on_stream(stream):
                out.copy_(host_out, non_blocking=True)
                return stream.record_event()

        ticket.stage(land)
        return launch(host_out, host_rows)


def _error_of(future: torch.futures.Future[object]) -> str | None:
    try:
        future.value()
    except Exception as error:
        return str(error)
    return None
