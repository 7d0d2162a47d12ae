"""Threads of gloo that take their turn.

A thread of gloo that wakes up for a message while its own rank is sending to the same peer finds that pair locked, and
asks again until it is free. Where there are more ranks than cores the lock's holder has often just lost its core to it:
waking the peer preempts who sends. So it spins until the scheduler ends its slice. In Linux's policy for batches a
thread that wakes up preempts nobody; it shares the cores as before.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_TASKS = Path("/proc/self/task")
_NAME = "gloo_tcp_loop"


def take_turns() -> None:
    """Let the threads that serve the gloo groups of this process, as far as they have been made, preempt nobody.

    Nothing happens where the system has no such policy, or forbids to set it, or where torch gives these threads no
    name, as 2.11.
    """
    for task in gloo_threads():
        with suppress(OSError):
            os.sched_setscheduler(task, os.SCHED_BATCH, os.sched_param(0))


def gloo_threads() -> list[int]:
    """Ids of the threads that serve gloo groups of this process; none where the system does not tell."""
    found = []
    if hasattr(os, "SCHED_BATCH") and _TASKS.is_dir():
        for task in _TASKS.iterdir():
            with suppress(OSError):  # it has ended
                if (task / "comm").read_text().strip() == _NAME:
                    found.append(int(task.name))
    return found
