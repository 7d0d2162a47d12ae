"""Abort: make every wait of this process in a collective or transfer end with an error, from another thread."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

_NEVER_SENT = 2**31 - 1  #: tag of a message that nobody sends


def abort_groups() -> None:
    """Break all process groups of this process; they cannot be used again."""
    for group in list(dist.distributed_c10d._world.pg_map):
        with suppress(Exception):  # one that is broken already
            if dist.get_backend(group) == "gloo":
                _break_gloo(group)
            else:
                group.abort()


def _break_gloo(group: dist.ProcessGroup) -> None:
    """gloo's own abort does nothing, but a receive that runs into its timeout closes the connections of its group."""
    for peer in range(group.size()):
        if peer == group.rank():
            continue
        try:
            group.recv([torch.empty(1)], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))
        except RuntimeError as error:
            if "Timed out" in str(error):
                return
            # This connection was closed already, which closes no other.
