"""Copies between an accelerator and host memory, beside the computation; on the CPU a thread makes them."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .device import EventMoment, on_stream, pinned_empty
from .tickets import Moments, Transfer

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Where to, where from: tensors of the same bytes."""


class Copying(Protocol):
    """Copies under way; both ends must be kept until the wait."""

    def wait(self, timeout_s: float) -> bool:
        """Let the computation wait until they are done.

        On an accelerator the current stream waits and the host goes on; elsewhere the host waits, for no longer than
        `timeout_s` seconds.

        Returns:
            False: they are not.
        """

    def transfer(self) -> Transfer:
        """What became of them; after the wait."""


class Copyist(Protocol):
    """Makes copies one after the other."""

    def copy(self, name: str, pairs: Sequence[Pair]) -> Copying:
        """Begin, behind what the computation has been given so far; returns at once."""


def copyist(device: torch.device) -> Copyist:
    """One for copies between a device and host memory.

    Streams come in turns from a small pool, so an owner asks once and keeps it.
    """
    return ThreadCopyist() if device.type == "cpu" else StreamCopyist(torch.Stream(device))


def host_empty(like: Tensor) -> Tensor:
    """Host memory for a copy of a tensor."""
    return (
        torch.empty(like.shape, dtype=like.dtype) if like.device.type == "cpu" else pinned_empty(like.shape, like.dtype)
    )


class StreamCopyist:
    """On a stream of an accelerator."""

    def __init__(self, stream: torch.Stream) -> None:
        self._stream = stream

    def copy(self, name: str, pairs: Sequence[Pair]) -> Copying:
        self._stream.wait_stream(torch.accelerator.current_stream(self._stream.device))
        with on_stream(self._stream):
            posted = EventMoment(self._stream)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return _OnStream(name, _size(pairs), self._stream.device, posted, EventMoment(self._stream))


class _OnStream:
    """Copies on a stream, which begin and end at moments of it."""

    def __init__(self, name: str, size: int, device: torch.device, posted: EventMoment, finished: EventMoment) -> None:
        self._device, self._moments = device, (posted, finished)
        self._transfer = Transfer(name, time.monotonic(), size=size)

    def wait(self, timeout_s: float) -> bool:
        posted, finished = self._moments
        here = torch.accelerator.current_stream(self._device)
        stopped = EventMoment(here)
        finished.block(here)
        moments: Moments = (posted, finished, stopped, EventMoment(here))
        self._transfer.moments, self._transfer.finished = moments, time.monotonic()
        return True

    def transfer(self) -> Transfer:
        return self._transfer


class ThreadCopyist:
    """In a thread, which plays the stream of an accelerator."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[_InThread | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._queue,), name="dualpipe copies", daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def copy(self, name: str, pairs: Sequence[Pair]) -> Copying:
        copying = _InThread(name, pairs)
        self._queue.put(copying)
        return copying


class _InThread:
    """Copies in the queue of a thread, or done."""

    def __init__(self, name: str, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._done = threading.Event()
        self._error: RuntimeError | None = None
        self._transfer = Transfer(name, time.monotonic(), size=_size(pairs))

    def run(self) -> None:
        """Make them, in the thread."""
        self._transfer.posted = time.monotonic()
        try:
            for target, source in self._pairs:
                target.copy_(source)
        except RuntimeError as error:
            self._error = error
        self._transfer.finished = time.monotonic()
        self._done.set()

    def wait(self, timeout_s: float) -> bool:
        start = time.monotonic()
        done = self._done.wait(timeout_s)
        self._transfer.waited = time.monotonic() - start
        if self._error is not None:
            raise self._error
        return done

    def transfer(self) -> Transfer:
        return self._transfer


def _work(queue: SimpleQueue[_InThread | None]) -> None:
    with torch.no_grad():
        while (copying := queue.get()) is not None:
            copying.run()
            del copying


def _size(pairs: Sequence[Pair]) -> int:
    return sum(target.nbytes for target, _ in pairs)
