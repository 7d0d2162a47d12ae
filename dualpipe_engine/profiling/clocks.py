"""Clocks: how far a rank's clock is ahead of the first rank's, from round trips between the two."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

TRIPS = 10  #: the shortest of them says most


def clock_offset(group: dist.ProcessGroup, clock: Callable[[], float] = time.monotonic) -> tuple[float, float]:
    """Seconds that this rank's clock is ahead of that of the group's first rank, and the most that this can be wrong
    by: half of the shortest round trip. Collective.

    Args:
        group: a gloo group.
        clock: this rank's clock, seconds.
    """
    rank = dist.get_rank(group)
    box = torch.zeros(1, dtype=torch.float64)
    if rank:
        first = dist.get_global_rank(group, 0)
        best = (float("inf"), 0.0)
        for _ in range(TRIPS):
            sent = clock()
            dist.send(box, first, group=group)
            dist.recv(box, first, group=group)
            back = clock()
            best = min(best, (back - sent, (sent + back) / 2 - float(box)))
        return best[1], best[0] / 2
    for other in range(1, dist.get_world_size(group)):
        peer = dist.get_global_rank(group, other)
        for _ in range(TRIPS):
            dist.recv(box, peer, group=group)
            box[0] = clock()
            dist.send(box, peer, group=group)
    return 0.0, 0.0
