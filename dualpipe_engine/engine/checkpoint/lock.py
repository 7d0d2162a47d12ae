"""FolderLock: one job at a time saves into a folder of checkpoints.

The lock is the kernel's (`flock`), so that it ends with its process. Some file systems keep it to one machine, or have
none: who holds it is written down as well, and what a job on another machine is writing is left alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from deepspeed.utils import logger

from ...errors import CheckpointError
from ...schedule.plain_json import parse

NAME = ".dualpipe.lock"
RETRY_S = 0.1


class FolderLock:
    """Of a job that saves into `folder`, until it is released.

    Args:
        folder: of checkpoints; made if missing.
        job: name of this job, as it stands in the names of unfinished folders.
        patience_s: seconds to wait for another job.

    Attributes:
        elsewhere: the job of another machine that may still be saving; None if there is none.
        clock: the file system's time when the lock was taken, in seconds as in `os.stat`.

    Raises:
        CheckpointError: another job is saving all the time.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, job: str, patience_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / NAME, "a+")  # noqa: SIM115
        try:
            self._take(folder, patience_s)
            self._file.seek(0)
            holder = _parsed(self._file.read())
            self.elsewhere: str | None = holder.get("job") if holder.get("boot", _boot()) != _boot() else None
            self._note(json.dumps({"job": job, "host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}))
            self.clock = os.fstat(self._file.fileno()).st_mtime
        except BaseException:
            self._file.close()
            raise

    def release(self) -> None:
        """Let others save."""
        if not self._file.closed:
            with suppress(OSError):
                self._note("")
            self._file.close()

    def _take(self, folder: Path, patience_s: float) -> None:
        until = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise CheckpointError(
                        f"{_holder(folder)} is saving into {folder}: give each job a folder of its own, or save again "
                        "later"
                    ) from None
                time.sleep(RETRY_S)
            except OSError as error:
                logger.warning(f"{folder} cannot be locked ({error}): let no second job save into it")
                return

    def _note(self, text: str) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text)
        self._file.flush()


def _holder(folder: Path) -> str:
    found = _parsed((folder / NAME).read_text(errors="replace"))
    return (
        f"another job (process {found['pid']} on {found['host']})" if {"pid", "host"} <= set(found) else "another job"
    )


def _parsed(text: str) -> dict[str, str]:
    """What a lock says of the job that holds it."""
    try:
        found = parse(text)
    except ValueError:
        return {}
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _boot() -> str:
    """Tells one start of one machine from all others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
