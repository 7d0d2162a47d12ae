"""Alike: an error that all ranks raise at one place of their program, of which none needs to be told."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

MEET_S = 1.0  #: seconds from the error of the first rank to that of the last


class Alike:
    """Compares the errors of ranks by the job's store, so that those that wait in a collective are not disturbed.

    Args:
        share: gives rank 0's value to all ranks; collective.
    """

    def __init__(self, share: Callable[[str], str]) -> None:
        self._name = share(uuid4().hex)
        self._asked = 0

    def raised_by_all(self, error: Exception) -> bool:
        """Whether every rank raises an error of this class at this line now; wait up to `MEET_S` for them."""
        self._asked += 1
        keys = [f"dualpipe/{self._name}/{self._asked}/{rank}" for rank in range(dist.get_world_size())]
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(keys[dist.get_rank()], _place(error))
            store.wait(keys, timedelta(seconds=MEET_S))
            return len(set(store.multi_get(keys))) == 1
        except (dist.DistError, RuntimeError):  # one has not come, or the store is gone
            return False


def _place(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    return f"{type(error).__name__} {where}"
