"""SideStream: collectives that run beside the schedule, on accelerators on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist

from ...runtime.observer import Observer, Stretch
from ...schedule.progress import waiting


class _Beside:
    """A stream of an accelerator, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def behind(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Run the body on the stream, after what the current one has been given; it may read `tensors`, which the
        caller may drop at once."""
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in tensors:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def rejoin(self) -> None:
        """Let the current stream wait for it."""
        torch.cuda.current_stream().wait_stream(self._stream)


class _InTurn:
    """In its place on the CPU, which does one thing after the other."""

    def behind(self, tensors: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        return nullcontext()

    def rejoin(self) -> None:
        pass


class SideStream:
    """Collectives under way, finished in the order in which they were posted.

    Nothing here blocks before `drain`: a rank that waited for its twin in the middle of a schedule could keep back what
    the twin waits for.

    Args:
        device: where the gradients are.
        observer: records from when to when each collective is under way.
    """

    def __init__(self, device: torch.device, observer: Observer) -> None:
        self._observer = observer
        self._stream: _Beside | _InTurn = _Beside(device) if device.type == "cuda" else _InTurn()
        self._open: deque[tuple[dist.Work | None, torch.Tensor, Callable[[], None], Stretch]] = deque()

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What the collectives under way work on."""
        return [buffer for _, buffer, _, _ in self._open]

    def behind(self, tensors: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
        """Run the body on the side stream, after what the current stream has been given; it may read `tensors`,
        which the caller may drop at once."""
        return self._stream.behind(tensors)

    def post(self, work: dist.Work | None, buffer: torch.Tensor, done: Callable[[], None]) -> None:
        """Remember a collective.

        Args:
            work: its handle; None when there is nothing to wait for.
            buffer: kept alive until it is done.
            done: called once it is, on the side stream.
        """
        with self.behind(()):
            self._open.append((work, buffer, done, self._observer.reducing()))

    def poll(self) -> None:
        """Finish what is done; never waits."""
        while self._open and (self._open[0][0] is None or self._open[0][0].is_completed()):
            self._finish()

    def drain(self) -> None:
        """Wait for everything, and let the current stream wait for the side stream."""
        while self._open:
            self._finish()
        self._stream.rejoin()

    def clear(self) -> None:
        """Forget what a failed batch has left."""
        self._open.clear()

    def _finish(self) -> None:
        work, _, done, stretch = self._open.popleft()
        with self.behind(()):
            if work is not None:
                with waiting():
                    work.wait()
            done()
            stretch.stop()
