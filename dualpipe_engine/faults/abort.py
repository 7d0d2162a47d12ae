"""Abort: make every wait of this process in a collective or transfer end, from another thread.

Over gloo it ends with an error. Over NCCL it ends as if the transfer were done, and the data is whatever was there: ask
`Watch.check` before anything is made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Backend

_NEVER_SENT = 2**31 - 1  #: tag of a message that nobody sends


def abort_groups() -> None:
    """Break all process groups of this process; they cannot be used again."""
    others: list[Any] = []
    for group in list(dist.distributed_c10d._world.pg_map):
        for backend in _backends(group):
            if backend.name() == "gloo":
                with suppress(Exception):  # one that is broken already
                    _break_gloo(backend)
            else:
                others.append(backend)
    # An abort waits for the kernels of its communicator, which may be queued behind those of another one: all at once.
    grouped = next((backend for backend in others if hasattr(backend, "_group_start")), None)
    if grouped is not None:
        with suppress(Exception):
            grouped._group_start()
    for backend in others:
        with suppress(Exception):
            backend.abort()
    if grouped is not None:
        with suppress(Exception):
            grouped._group_end()


def _backends(group: dist.ProcessGroup) -> list[Backend]:
    """The backends of a group, one for each kind of device that it serves; none in a group of others."""
    found: dict[int, Backend] = {}
    for device in getattr(group, "_device_types", ()):
        with suppress(Exception):
            backend = group._get_backend(device)
            found[id(backend)] = backend
    return list(found.values())


def _break_gloo(backend: Backend) -> None:
    """gloo's own abort does nothing, but a receive that runs into its timeout closes the connections of its group."""
    for peer in range(backend.size()):
        if peer == backend.rank():
            continue
        try:
            post: Callable[..., dist.Work] = backend.recv  # type: ignore[attr-defined]  # torch types it of groups only
            post([torch.empty(1)], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))
        except RuntimeError as error:
            if "Timed out" in str(error):
                return
            # This connection was closed already, which closes no other.
