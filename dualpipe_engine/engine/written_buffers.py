"""Buffers that forwards write: of the two copies of a mirrored stage each would see half of the micro-batches."""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import PipelineRuntimeError
from ..models.routing import Router
from ..schedule.placement import BIDIRECTIONAL
from .agreement import raise_everywhere

_REMEDY = (
    'take "schedule": "dualpipev", "zb1p" or "1f1b", where each stage runs on one rank, or a normalization without '
    "statistics"
)


def check_statistics(module: nn.Module, placement: Any) -> None:
    """Refuse layers whose forwards keep statistics of what they see, where two copies see half of it each. Collective
    over all ranks.

    Raises:
        ConfigError: there is one.
    """
    if placement.name != BIDIRECTIONAL:
        return
    wrong = [
        f"{name} ({type(part).__name__}) keeps statistics of the batches that it sees, but each of its two copies "
        f"would see half of them: {_REMEDY}"
        for name, part in module.named_modules()
        if isinstance(part, _NormBase) and part.running_mean is not None
    ]
    raise_everywhere(wrong[:1])


class WrittenBuffers:
    """Finds buffers that forwards write, in the first batch, and compares the two copies of a mirrored stage.

    A buffer that both copies write with the same values (a table that is made when it is needed) is no trouble.

    Args:
        engine: the DualPipeEngine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._before: dict[str, tuple[int, int]] | None = None
        self._done = engine.plan.placement.name != BIDIRECTIONAL

    def begin(self) -> None:
        if not self._done:
            self._before = {name: (id(buffer), buffer._version) for name, buffer in self._buffers()}

    def check(self) -> None:
        """Before the optimizer's first step. Collective over the ranks of a pipeline.

        Raises:
            PipelineRuntimeError: the copies of a buffer differ; on both ranks.
        """
        if self._done or self._before is None:
            return
        self._done = True
        before, place = self._before, self._engine.place
        written = {n: _hash(b) for n, b in self._buffers() if before.get(n) != (id(b), b._version)}
        found: list[Any] = [None] * len(place.pipeline)
        dist.all_gather_object(found, written, group=self._engine._pipeline_group)
        for rank, theirs in enumerate(found):
            for name, value in theirs.items():
                if found[len(found) - 1 - rank].get(name) != value:
                    raise PipelineRuntimeError(
                        f"forwards write the buffer {name}, and its two copies, each of which sees half of the "
                        f"micro-batches, hold other values: {_REMEDY}"
                    )

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        counted = {id(part.counts) for part in self._engine.module.modules() if isinstance(part, Router)}
        return [(name, each) for name, each in self._engine.module.named_buffers() if id(each) not in counted]


def _hash(buffer: torch.Tensor) -> int:
    return zlib.crc32(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
