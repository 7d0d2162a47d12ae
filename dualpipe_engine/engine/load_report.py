"""Load report: what the layers with experts have counted in a step, brought together for logs and the profile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..comm.from_all import from_all
from ..errors import ConfigError
from ..models.autoep.layer import SharedMoE
from ..models.block import MoEBlock
from ..models.counting import Counting
from ..profiling.expert_load import LayerLoad, LoadReport
from .context import Context
from .given import LayerFunction
from .placing.module import PlacedModule
from .placing.partition import stage_of_layer
from .placing.stages import params_of
from .section import DualPipeConfig


class _Block(NamedTuple):
    """A block of experts: who counts, what it counts, how many experts a token sees, and by how many ranks they are
    shared."""

    counting: Counting
    experts: nn.Module
    top_k: int
    ranks: int


def check_load_report(module: PlacedModule, config: DualPipeConfig) -> bool:
    """Whether any layer of the pipeline counts the rows of experts. Collective over all ranks.

    Raises:
        ConfigError: none does, but a report is asked for; the same on every rank.
    """
    found = any(from_all(any(isinstance(part, Counting) for part in module.modules())))
    if not found and config.load_report_steps is not None:
        raise ConfigError(
            '"load_report_steps" is for layers with experts of dualpipe_engine.models, and for those of the '
            '"expert_parallel" section, but there are none: leave it out',
            everywhere=True,
        )
    return found


class LoadReporter:
    """Makes the reports of an engine.

    Args:
        context: of the engine.
        pipeline: the ranks of this pipeline.
    """

    def __init__(self, context: Context, pipeline: dist.ProcessGroup) -> None:
        self._context, self._pipeline = context, pipeline
        self._blocks = [
            (name, stage_of_layer(context.module.parts, number), block)
            for number, layer in _layers(context.module)
            for name, block in _named(number, layer)
        ]

    def due(self) -> bool:
        """Whether the step that is done is to be reported."""
        every = self._context.load_report_steps
        return every is not None and self._context.steps.done() % every == 0

    def report(self) -> LoadReport:
        """Read the loads of the step back. Collective over the ranks of a pipeline."""
        loads = [block.counting.load for _, _, block in self._blocks]
        rows = torch.cat(loads).tolist() if loads else []  # the host waits here, once
        mine, at = {}, 0
        for name, stage, block in self._blocks:
            size = len(block.counting.load)
            counted = tuple(round(each) for each in rows[at : at + size])
            mine[name] = LayerLoad(name, stage, counted, block.ranks, self._share(stage, block))
            at += size
        found = {name: load for theirs in from_all(mine, self._pipeline) for name, load in theirs.items()}
        return LoadReport(self._context.steps.done(), tuple(found[name] for name in sorted(found, key=_in_order)))

    def _share(self, stage: int, block: _Block) -> float:
        """Of the parameters in matrices that a token of the stage is multiplied with, those of the block's experts."""
        functions = self._context.views[stage].forward_funcs
        whole = sum(param.numel() for param in params_of(functions) - _looked_up(functions) if param.dim() > 1)
        here = [other for _, of, other in self._blocks if of == stage]
        seen = whole - sum(_held(other) - _seen(other) for other in here)
        return _seen(block) / seen if seen else 0.0


def _held(block: _Block) -> int:
    return sum(param.numel() for param in block.experts.parameters())


def _seen(block: _Block) -> float:
    """Parameters of the experts of one token."""
    return sum(param.numel() / len(param) for param in block.experts.parameters()) * block.top_k


def _looked_up(functions: Iterable[LayerFunction]) -> set[nn.Parameter]:
    tables = [
        part
        for layer in functions
        if isinstance(layer, nn.Module)
        for part in layer.modules()
        if isinstance(part, nn.Embedding)
    ]
    return {param for table in tables for param in table.parameters()}


def _layers(module: PlacedModule) -> list[tuple[int, nn.Module]]:
    numbered = [(number, module._modules.get(str(number))) for number in module.dualpipe_layers]
    return [(number, layer) for number, layer in numbered if layer is not None]


def _named(number: int, layer: nn.Module) -> list[tuple[str, _Block]]:
    found = [(path, block) for path, part in layer.named_modules() if (block := _block_of(part)) is not None]
    return [(str(number) if len(found) == 1 else f"{number}.{path}", block) for path, block in found]


def _block_of(part: nn.Module) -> _Block | None:
    if isinstance(part, MoEBlock):
        return _Block(part.router, part.experts, part.config.top_k, part.ep_size)
    if isinstance(part, SharedMoE):
        return _Block(part, part.experts, part.top_k, part.ep_size)
    return None


def _in_order(name: str) -> tuple[int, str]:
    number, _, path = name.partition(".")
    return int(number), path
