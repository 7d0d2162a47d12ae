"""Save: one checkpoint on its way to the disk.

    rank 0        lock, tidy up                                  list files, fsync, rename, latest, unlock
    every rank                   serialize -> write, fsync, sums
                                 |<- training waits ->|          (in the background: up to here only, `serialize`)

In the background a thread of each rank writes, and that of rank 0 renames when the lists of all ranks are there.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from deepspeed.utils import logger

from ...comm.from_all import from_all
from ...errors import CheckpointError
from ..given import CheckpointEngine
from .files import check_free, publish, saved_by, settle, sync, unfinished, write_text
from .lock import FolderLock
from .sums import merge_parts, part_path
from .writer import Writer

POLL_S = 0.05  #: between looks for the lists of other ranks
NICENESS = 10  #: of the thread: it takes the time in which the pipeline waits, before that in which it computes


class Save:
    """One save, collective over all ranks.

    Args:
        serializer: DeepSpeed's checkpoint engine.
        top: folder of checkpoints.
        tag: of this one.
        job: name of the job, the same on all ranks.
        age_s: seconds since the job began.
        latest: whether `latest` shall name it.
        background: write in a thread.
        patience_s: seconds to wait for another job, and, at the end of the process, for other ranks' files.

    Attributes:
        writer: stands in for the checkpoint engine.
        folder: where the files go until all are there.

    Raises:
        CheckpointError: another job saves into the folder, or it cannot be written; on all ranks.
    """

    def __init__(
        self,
        serializer: CheckpointEngine,
        top: Path,
        tag: str,
        job: str,
        *,
        age_s: float,
        latest: bool,
        background: bool,
        patience_s: float,
    ) -> None:
        self.writer = Writer(serializer, background)
        self._top, self._tag, self._job, self._latest = top, tag, job, latest
        self._target, self._patience = top / tag, patience_s
        self.folder = unfinished(self._target, job)
        self._lock: FolderLock | None = None
        self._thread: threading.Thread | None = None
        self._stop, self._written = threading.Event(), threading.Event()
        self._on_first(self._begin, age_s)

    def finish(self) -> None:
        """Write, and give the checkpoint its name. Collective over all ranks.

        Raises:
            CheckpointError: it could not be written; on all ranks, and nothing of it is left.
        """
        self.writer.finish(self.folder, dist.get_rank())
        self._agree(self.writer.error)
        self._on_first(self._complete_when_seen, dist.get_world_size(), lambda: True)

    def start(self) -> None:
        """Do what `finish` does in a thread. Not collective."""
        self._thread = threading.Thread(target=self._run, name="dualpipe checkpoint")
        self._thread.start()

    def follow(self, wait: bool) -> bool:
        """Look after a started save. Collective over all ranks.

        Args:
            wait: for its end.

        Returns:
            Whether it has ended.

        Raises:
            CheckpointError: it could not be written; on all ranks, and nothing of it is left.
        """
        assert self._thread is not None
        if wait:
            self._written.wait()
        states = from_all((self._written.is_set(), self.writer.error))
        self._raise([error for _, error in states])
        if not all(written for written, _ in states):
            return False
        self._thread.join()
        self._agree(self.writer.error)
        return True

    def abandon(self) -> None:
        """Let other jobs save, after an error that ends this one. Not collective."""
        if self._lock is not None:
            self._lock.release()

    # -- on rank 0 -----------------------------------------------------------------------------------------------

    def _begin(self, age_s: float) -> None:
        self._lock = FolderLock(self._top, self._job, self._patience)
        job, when = saved_by(self._target)
        if job not in (None, self._job) and when > self._lock.clock - age_s:
            raise CheckpointError(
                f"another job has saved {self._target} since this one began: give each job a folder of its own"
            )
        check_free(self._target)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        settle(self._target.parent, self._lock.elsewhere)

    def _complete_when_seen(self, world: int, counts: Callable[[], bool]) -> None:
        """Give the checkpoint its name when the lists of all ranks are seen, which shared file systems may show late.

        Args:
            world: number of ranks.
            counts: whether patience comes to an end.
        """
        left = self._patience
        while not all(part_path(self.folder, rank).is_file() for rank in range(world)):
            if self._stop.wait(POLL_S):
                return
            left -= POLL_S * counts()
            if left < 0:
                raise CheckpointError(f"the files of all ranks were not seen within {self._patience:g} s")
        merge_parts(self.folder, world)
        publish(self._target, self._job)
        if self._latest:
            write_text(self._top / "latest", self._tag)
            sync(self._top)
        self.abandon()

    def _discard(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.abandon()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere the whole process would have it
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        rank, world = dist.get_rank(), dist.get_world_size()
        self.writer.finish(self.folder, rank)
        self._written.set()
        if rank == 0:
            # While steps follow, other ranks tell their errors there.
            self.writer.attempt(self._complete_when_seen, world, lambda: not threading.main_thread().is_alive())
        if self.writer.error is not None:  # should no step follow that raises it
            logger.error(f"{self._target} is not saved: {self.writer.error}")

    # -- agreement -----------------------------------------------------------------------------------------------

    def _on_first(self, function: Callable[..., object], *args: object) -> None:
        """Run on rank 0 while the others wait for what comes of it."""
        error = None
        if dist.get_rank() == 0:
            try:
                function(*args)
            except (CheckpointError, OSError) as caught:
                error = str(caught) if isinstance(caught, CheckpointError) else f"{type(caught).__name__}: {caught}"
        box = [error]
        dist.broadcast_object_list(box, 0)
        self._raise(box)

    def _agree(self, error: str | None) -> None:
        self._raise(from_all(error))

    def _raise(self, errors: list[str | None]) -> None:
        for rank, error in enumerate(errors):
            if error is not None:
                self._discard()
                raise CheckpointError(
                    f"{self._target} is not saved, and what was saved before stands: rank {rank}: {error}",
                    everywhere=True,
                )
