"""The cores that the ranks of a benchmark compute on."""

from __future__ import annotations

import os


def can_pin(ranks: int) -> bool:
    """Whether there is a core for each rank, and the system lets a process keep to it."""
    return hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) >= ranks


def pin(rank: int, ranks: int) -> None:
    """Keep this process, with the threads it has, to a core of its own where that can be."""
    if can_pin(ranks):
        core = sorted(os.sched_getaffinity(0))[rank]
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {core})


def cores_of(ranks: int) -> str:
    """What the ranks compute on, in words."""
    return f"{os.cpu_count()} cores, {'one a rank' if can_pin(ranks) else 'shared'}"
