"""Bytes of activations that an engine of ours holds on the CPU, op by op."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from ..runtime.held import held_behind
from ..schedule.op import Op

Engine: TypeAlias = Any


def activation_watch(engine: Engine) -> AbstractContextManager[list[tuple[Op, int]]]:
    """Record the bytes of activations behind each op of the batches in the body: of all that operations have made and
    that lives, without parameters, their gradients, those in a reduction, what is on its way between stages, and host
    memory. What STEP leaves is the optimizer's.
    """
    fixed = [*engine.module.parameters(), *engine.module.buffers()]

    def away() -> int:
        return 0 if engine._offload is None else engine._offload.host_bytes()

    return held_behind(engine._executor, lambda: fixed + engine._tail.reduction.buffers(), away)
