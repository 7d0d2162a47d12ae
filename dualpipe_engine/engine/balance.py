""" "partition_method": "pairs": cut a PipelineModule so that the plan runs fast on it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.pipe import PipelineModule

from ..errors import ConfigError
from ..schedule.costs import UNIT
from ..schedule.layer_costs import read_layer_costs
from ..schedule.plan import Plan
from ..schedule.recut import best_cut
from .config import PAIRS, DualPipeConfig
from .layer_costs import estimated_costs
from .partition import check_layers, cut_layers


def stage_bounds(module: PipelineModule, plan: Plan, config: DualPipeConfig) -> list[int]:
    """Bounds of the plan's stages: stage s has layers bounds[s] to bounds[s+1] - 1. Collective over all ranks.

    With "pairs" the cut is the one on which the plan has the shortest simulated makespan, of those that
    `schedule.recut.best_cut` tries; times of layers come from the "layer_costs" file, else they are estimated. Any
    other method: see `cut_layers`.

    Raises:
        ConfigError: the layers cannot be cut, or the file is not for them.
    """
    num_stages = plan.placement.num_stages
    if config.partition_method != PAIRS:
        return cut_layers(module, num_stages, config.partition_method)
    check_layers(module, num_stages)
    weights = estimated_costs(module) if config.layer_costs is None else _stored(config.layer_costs)
    if len(weights) != len(module._layer_specs):
        raise ConfigError(
            f'"layer_costs": {config.layer_costs} has {len(weights)} times, but the model has '
            f"{len(module._layer_specs)} layers: measure this model again"
        )
    compute = plan.compute_only()
    return list(best_cut(weights, plan.placement, UNIT, lambda _: compute).bounds)


def _stored(path: str) -> list[float]:
    """The file as rank 0 sees it, on every rank."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = read_layer_costs(path)
        except ConfigError as error:
            box[0] = error
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], ConfigError):
        raise box[0]
    return list(box[0])
