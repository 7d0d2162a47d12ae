"""Buffers that forwards write: of the two copies of a mirrored stage each would see half of the micro-batches."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NoReturn

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ...comm.from_all import from_all
from ...errors import PipelineRuntimeError
from ...models.counting import Counting
from ...schedule.placement import Placement
from .agreement import raise_everywhere

_REMEDY = (
    'take "schedule": "dualpipev", "zb1p" or "1f1b", where each stage runs on one rank, or a normalization without '
    "statistics"
)


def check_statistics(module: PipelineModule, placement: Placement, recomputed: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose forwards keep statistics of what they see, where two copies see half of it each, or where
    activations are recomputed, so that it is seen twice. Collective over all ranks.

    Args:
        module: the stages of this rank.
        placement: of all stages.
        recomputed: modules that are computed again, by name.

    Raises:
        ConfigError: there is one.
    """
    raise_everywhere(kept_statistics(module, placement, recomputed)[:1])


def kept_statistics(module: PipelineModule, placement: Placement, recomputed: Mapping[str, nn.Module]) -> list[str]:
    """What `check_statistics` refuses on this rank, and why."""
    twice = "but would see each twice, as activations are recomputed: leave out {}, or take a normalization without "
    kept = [(name, part) for name, part in module.named_modules() if isinstance(part, _NormBase)]
    kept = [(name, part) for name, part in kept if part.running_mean is not None]
    if placement.num_directions > 1:
        why = f"but each of its two copies would see half of them: {_REMEDY}"
    elif module.activation_checkpoint_interval > 0:
        why = twice.format("activation_checkpoint_interval") + "statistics"
    else:
        again = {inner for part in recomputed.values() for inner in part.modules()}
        kept = [(name, part) for name, part in kept if part in again]
        why = twice.format('its name in "recompute"') + "statistics"
    return [
        f"{name} ({type(part).__name__}) keeps statistics of the batches that it sees, {why}" for name, part in kept
    ]


class WrittenBuffers:
    """Finds buffers that forwards write, in the first batch, and compares the two copies of a mirrored stage.

    A buffer that both copies write with the same values (a table that is made when it is needed) is no trouble, unless
    it goes on changing, as the second batch shows: a counter, or the vectors of a spectral norm, which then are those
    of half as many forwards.

    Args:
        module: the stages of this rank.
        placement: which ranks hold copies.
        pipeline: the ranks of this pipeline.
        replicas: of the pipeline.
    """

    def __init__(self, module: nn.Module, placement: Placement, pipeline: dist.ProcessGroup, replicas: int) -> None:
        self._module, self._pipeline, self._replicas = module, pipeline, replicas
        self._before: dict[str, tuple[int, int]] | None = None
        self._written: dict[str, tuple[torch.Size, int]] | None = None
        self._done = placement.num_directions == 1

    def begin(self) -> None:
        if self._done:
            return
        if self._written is None:
            self._before = {name: (id(buffer), buffer._version) for name, buffer in self._buffers()}
        else:
            self._written = {n: _value(b) for n, b in self._buffers() if n in self._written}

    def check(self) -> None:
        """Before the optimizer's first and second step. Collective over the ranks of a pipeline.

        Raises:
            PipelineRuntimeError: the copies of a buffer differ, or a buffer goes on changing; on all ranks.
        """
        if self._done or self._before is None:
            return
        if self._written is None:
            self._written = self._compare_copies(self._before)
        else:
            self._done = True
            self._look_again(self._written)

    def _compare_copies(self, before: dict[str, tuple[int, int]]) -> dict[str, tuple[torch.Size, int]]:
        written = {n: _value(b) for n, b in self._buffers() if before.get(n) != (id(b), b._version)}
        written_of_ranks = from_all(written, self._pipeline)
        self._done = not any(written_of_ranks)
        for rank, theirs in enumerate(written_of_ranks):
            for name, value in theirs.items():
                if written_of_ranks[len(written_of_ranks) - 1 - rank].get(name) != value:
                    self._refuse(
                        f"forwards write the buffer {name}, and its two copies, each of which sees half of the "
                        f"micro-batches, hold other values: {_REMEDY}"
                    )
        return written

    def _look_again(self, before: dict[str, tuple[torch.Size, int]]) -> None:
        now = {name: _value(buffer) for name, buffer in self._buffers() if name in before}
        changing = [
            name for name, (shape, value) in now.items() if before[name][0] == shape and before[name][1] != value
        ]
        if names := [name for each in from_all(changing, self._pipeline) for name in each]:
            self._refuse(
                f"forwards change the buffer {names[0]} again and again, and its two copies, each of which runs half "
                f"of the micro-batches, change it half as often: {_REMEDY}"
            )

    def _refuse(self, text: str) -> NoReturn:
        raise PipelineRuntimeError(text, everywhere=self._replicas == 1)

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        counted = {id(part.counts) for part in self._module.modules() if isinstance(part, Counting)}
        return [(name, each) for name, each in self._module.named_buffers() if id(each) not in counted]


def _value(buffer: torch.Tensor) -> tuple[torch.Size, int]:
    raw = buffer.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return buffer.shape, zlib.crc32(raw.numpy().tobytes())
