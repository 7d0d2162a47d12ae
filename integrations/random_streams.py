"""Random numbers of the stages, apart from those of the data.

All ranks of a pipeline collate the same batches, some at random (masked tokens, augmentation), by the generators of
Python, numpy and torch on the host. Dropout draws another amount on each rank: so stages have a stream of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine

State = tuple[Any, Any, torch.Tensor]
"""Of the generators of Python, numpy and torch on the host; loaders do not draw from those of an accelerator."""


def host_state() -> State:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_host_state(state: State) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


@contextmanager
def undrawn() -> Iterator[None]:
    """Within, what is drawn from the generators of the host and of the device counts for nothing."""
    accelerator, host = get_accelerator(), host_state()
    device = accelerator.get_rng_state()
    try:
        yield
    finally:
        accelerator.set_rng_state(device)
        set_host_state(host)


class StageRandomness:
    """`with randomness():` draws from the stream of this rank's stages.

    It begins as the generators stand when it is first used, and goes on where the last such block has ended.
    """

    def __init__(self) -> None:
        self._state: State | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        outside = host_state()
        if self._state is not None:
            set_host_state(self._state)
        try:
            yield
        finally:
            self._state = host_state()
            set_host_state(outside)


def follow(engine: DualPipeEngine, source: int) -> None:
    """Let the generators of a pipeline go on as those of one of its ranks, the global rank `source`. Collective."""
    _take(source, engine._pipeline_group)


def follow_first(engine: DualPipeEngine) -> None:
    """Let the generators of the ranks that read the same batches go on as those of the first of them. Collective."""
    follow(engine, dist.get_process_group_ranks(engine._pipeline_group)[0])
    if engine.sharing.group is not None:
        _take(dist.get_process_group_ranks(engine.sharing.group)[0], engine.sharing.group)


def _take(source: int, group: dist.ProcessGroup) -> None:
    box = [host_state()]
    dist.broadcast_object_list(box, src=source, group=group)
    set_host_state(box[0])
