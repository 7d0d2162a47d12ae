"""Recovery: a batch that has failed on all ranks leaves an engine that trains on the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine

from ...comm.from_all import from_all
from ...faults.watch import Watch


class Recovery(PipelineEngine):
    """The part of `DualPipeEngine` that goes on after an error."""

    watch: Watch

    def _init_recovery(self, bound: bool) -> None:
        """Collective over all ranks.

        Args:
            bound: whether this rank cannot stop to compute within a batch, because others would miss it.
        """
        self.watch.recovers = not any(from_all(bound))

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """The body is a batch, in which all ranks take part."""
        self.watch.begin_batch()
        try:
            yield
        except BaseException as error:
            if getattr(error, "everywhere", False):
                self._forget_batch()
            raise
        finally:
            self.watch.end_batch()

    def _forget_batch(self) -> None:
        """Drop what a batch has left that was not stepped."""
        timer = self.timers(TRAIN_BATCH_TIMER)
        if getattr(timer, "started_", False):
            timer.stop()
        parts: Any = self
        if parts._store is not None:
            parts._store.take()
        parts._tail.forget()
