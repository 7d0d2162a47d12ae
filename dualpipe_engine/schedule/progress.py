"""Position: where a rank is in its program, written by the thread that runs it and read by the one that watches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from .op import B, F, I, Op, atoms
from .plan import Plan


@dataclass
class Position:
    """Attributes are set one at a time, without a lock: a reader sees each as it is at some moment.

    Args:
        plan: the plan that runs; None between batches.
        op: what runs.
        awaits: what is waited for: pipeline rank, stage that makes it, micro-batch, and whether it is a gradient.
        pipeline: global ranks of the pipeline's ranks.
        device_done: whether an accelerator has run all that it has been given up to the last op; None: the host
            computes itself.
    """

    plan: Plan | None = None
    op: Op | None = None
    awaits: tuple[int, int, int, bool] | None = None
    pipeline: tuple[int, ...] = ()
    device_done: Callable[[], bool] | None = None

    def awaited(self) -> tuple[int, str] | None:
        """The global rank that is waited for, and the op of its program that is."""
        plan, awaits = self.plan, self.awaits
        if plan is None or awaits is None or not self.pipeline:
            return None
        source, stage, micro, gradient = awaits
        kinds = (B, I) if gradient else (F,)
        for op in plan.programs[source]:
            if any((part.stage, part.micro) == (stage, micro) and part.kind in kinds for part in atoms(op)):
                return self.pipeline[source], str(op)
        return self.pipeline[source], f"{stage}{kinds[0]}{micro}"


#: Thread -> how many waits it is in. A thread belongs to the process, not to an engine, as its stack does.
_waits: dict[int, int] = {}


class waiting:
    """Context of what cannot go on without other ranks, or without a device that may wait for them.

    Whoever calls a collective, waits for a transfer or reads a tensor back (`item`, `tolist`, `float`) declares it: on
    an accelerator the wait shows in whatever reads the device next, which its stack does not tell from computation.

    Args:
        alone: whether nothing but the wait can fail in it, so that a RuntimeError is that of a transfer.
    """

    __slots__ = ("_alone", "_thread")

    def __init__(self, alone: bool = True) -> None:
        self._alone = alone

    def __enter__(self) -> None:
        self._thread = thread = threading.get_ident()
        _waits[thread] = _waits.get(thread, 0) + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _waits[self._thread] -= 1
        if self._alone:
            blame_transfer(error)


def blame_transfer(error: BaseException | None) -> None:
    """Declare that an error came out of a wait for another rank; others than a RuntimeError (Ctrl-C) never do."""
    if isinstance(error, RuntimeError):
        error.of_transfer = True  # type: ignore[attr-defined]


def of_transfer(error: BaseException) -> bool:
    """Whether an error has been declared to come out of a wait for another rank."""
    return getattr(error, "of_transfer", False)


def is_waiting(thread: int) -> bool:
    """Whether a thread has declared that it waits."""
    return _waits.get(thread, 0) > 0
