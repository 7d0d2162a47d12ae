"""Cut a PipelineModule into the stages of a plan: as its user says, or so that the plan runs fast on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule, TiedLayerSpec

from ...comm.from_all import from_all
from ...errors import ConfigError, raised_everywhere
from ...schedule.cuts.counts import bounds_of_counts, parse_counts
from ...schedule.cuts.fastest import best_cut
from ...schedule.cuts.layer_times import read_layer_costs
from ...schedule.plan import Plan
from ...schedule.timing.costs import UNIT, CostModel, PerStage
from ..section import PAIRS, DualPipeConfig
from .partition import check_layers, cut_layers, kept_together

Gathered = TypeVar("Gathered")


def stage_bounds(module: PipelineModule, plan: Plan, config: DualPipeConfig, costs: CostModel = UNIT) -> list[int]:
    """Bounds of the plan's stages: stage s has layers bounds[s] to bounds[s+1] - 1. Collective over all ranks.

    Layers of each stage that the configuration lists stay as they are listed; for other methods see `kept_together`.

    Args:
        costs: of the plan's stages as it was made, see `_bounds`.

    Raises:
        ConfigError: see `_bounds`.
    """
    counts = parse_counts(config.partition_method)
    if counts is not None:
        with raised_everywhere():
            return list(bounds_of_counts(counts, len(module._layer_specs), plan.placement))
    return kept_together(_bounds(module, plan, config, costs), module._layer_specs, plan.placement)


def _bounds(module: PipelineModule, plan: Plan, config: DualPipeConfig, costs: CostModel) -> list[int]:
    """The cut of the configuration's method. Collective over all ranks.

    With "pairs" the cut is the one on which the plan has the shortest simulated makespan, of those that
    `schedule.cuts.fastest.best_cut` tries; times of layers come from the "layer_costs" file, else they are estimated,
    and `costs` say how they divide into F, I and W, what a pair of F and B saves, and what a transfer takes.
    Any other method: see `cut_layers`.

    Raises:
        ConfigError: the layers cannot be cut, or the file is not for them.
    """
    num_stages = plan.placement.num_stages
    with raised_everywhere():
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
    whole = _of_the_model(costs, plan.placement.num_stages, weights)
    return list(best_cut(weights, plan.placement, whole, lambda _: compute).bounds)


def _of_the_model(costs: CostModel, stages: int, weights: Sequence[float]) -> CostModel:
    """Costs of so many stages as those of the whole model, with transfers in the unit of `weights`."""

    def total(cost: PerStage) -> float:
        return sum(cost) if isinstance(cost, tuple) else cost * stages

    f, i, w = total(costs.f), total(costs.i), total(costs.w)
    if not f + i + w:
        return UNIT
    comm = costs.comm * sum(weights) / (f + i + w)
    return CostModel(f, i, w, None if costs.fb is None else total(costs.fb), comm)


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


def estimated_costs(module: PipelineModule) -> list[float]:
    """Estimate of each layer's time, in parameters. Collective over the ranks of a pipeline.

    A layer's time is taken as proportional to the parameters in its matrices: a product with a matrix takes two
    operations a parameter and token forward and four backward, whatever the layer. A table that is looked up counts
    nothing, though it may have most parameters of the model: parameters of `nn.Embedding` and of other classes with
    "embedding" in their name. A `TiedLayerSpec` with a `forward_fn` is a head that multiplies by the tied table, so
    there the table counts. Vectors (norms, biases) and layers without parameters count nothing. A layer's specification
    or a module that knows better says so by an attribute `multiply_adds`, those of a token: of our experts those that a
    token sees count, and with multi-token prediction the head once for each depth, the second embedding nothing.

    The estimate is wrong where a parameter works for more or less than each token and nobody says so: convolutions,
    attention over long sequences, other experts. `measure_layers` is right there.

    Args:
        module: a PipelineModule as its constructor left it.
    """
    start = int(module.parts[module.stage_id])
    mine = {start + index: _matrix_parameters(module, start + index) for index in range(len(module.forward_funcs))}
    estimate = [float(size) for size in of_all_layers(module, mine)]
    return estimate if any(estimate) else [1.0] * len(estimate)


def _matrix_parameters(module: PipelineModule, layer: int) -> int:
    spec = module._layer_specs[layer]
    known = getattr(spec, "multiply_adds", None)
    if known is not None:
        return int(known)
    head = isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None
    tied = isinstance(spec, TiedLayerSpec)
    held = module.tied_modules[spec.key] if tied else module._modules.get(str(layer))
    if held is None:  # a plain function
        return 0
    counted: dict[int, torch.nn.Parameter] = {}
    stated = _count(held, counted)
    if head:
        names = spec.tied_weight_attr
        for name in [names] if isinstance(names, str) else names:
            weight = module._recursive_getattr(held, name)
            counted[id(weight)] = weight
    return stated + sum(param.numel() for param in counted.values() if param.dim() > 1)


def _count(part: torch.nn.Module, counted: dict[int, torch.nn.Parameter]) -> int:
    """The sum of what modules state, and into `counted` the parameters of the others."""
    stated = getattr(part, "multiply_adds", None)
    if stated is not None:
        return int(stated)
    if "embedding" not in type(part).__name__.lower():
        counted |= {id(param): param for param in part.parameters(recurse=False)}
    return sum(_count(child, counted) for child in part.children())


def of_all_layers(module: PipelineModule, mine: dict[int, Gathered]) -> list[Gathered]:
    """What the ranks of this pipeline know of their layers, in the order of the layers."""
    known = {layer: value for theirs in from_all(mine, module._grid.pp_proc_group) for layer, value in theirs.items()}
    return [known[layer] for layer in range(len(module._layer_specs))]
