"""From the configuration to the lowered, verified plan that all ranks run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule

from ..errors import ConfigError, PlanError
from ..schedule.cuts.counts import bounds_of_counts, parse_counts
from ..schedule.orders.registry import placement_of
from ..schedule.passes.lower import lower
from ..schedule.passes.offload import offload
from ..schedule.passes.verify import verify
from ..schedule.placement import Placement
from ..schedule.plan import Plan
from ..schedule.search.job_costs import Measurement
from ..schedule.search.make_plan import make_plan
from ..schedule.timing.costs import UNIT, CostModel
from .section import DualPipeConfig

OVERLAPPED = CostModel(fb=2.25)
"""Where pairs overlap and nothing was measured: a pair takes three quarters of its halves one after the other."""


StageCosts = Callable[[Placement], CostModel]
"""Costs of the stages of a placement, from this."""


def unmeasured_costs(module: PipelineModule, config: DualPipeConfig) -> CostModel:
    """What plans are optimized for when no costs are known: every stage alike, pairs faster than their halves if any
    layer brings an overlap."""
    kinds = [spec.typename if isinstance(spec, LayerSpec) else type(spec) for spec in module._layer_specs]
    ways = ("phases", "overlapped_forward_backward")
    overlaps = any(hasattr(kind, way) for kind in kinds for way in ways)
    return OVERLAPPED if overlaps and config.overlap is not False else UNIT


def costs_of_stages(module: PipelineModule, config: DualPipeConfig, measured: Measurement | None) -> StageCosts:
    """What the stages of a placement cost, on the cut that the configuration lists where single layers were measured.

    Args:
        module: the model.
        config: with "auto" replaced.
        measured: with what the configuration recomputes; None: nothing was.

    Raises (what is returned):
        ConfigError: the listed cut is for other layers or stages.
        PlanError: the costs are for other ranks.
    """
    if measured is None:
        return unmeasured_costs(module, config).for_placement
    counts, layers = parse_counts(config.partition_method), len(module._layer_specs)

    def on(placement: Placement) -> CostModel:
        if counts is None or measured.of_layers is None:
            return measured.placed(placement)
        return measured.placed(placement, bounds_of_counts(counts, layers, placement))

    return on


def make_lowered_plan(
    config: DualPipeConfig, num_ranks: int, num_micro: int, costs: StageCosts = UNIT.for_placement, exact: bool = False
) -> Plan:
    """Make, verify and lower the training plan.

    Args:
        config: names the schedule, or the file of a plan.
        num_ranks: pipeline ranks.
        num_micro: micro-batches of one pipeline per batch.
        costs: gives those of the stages of a placement.
        exact: as of `offload`.

    Raises:
        PlanError: the schedule cannot run on these ranks, a plan file is not valid, or see `exact`.
        ConfigError: a plan file is for other ranks or micro-batches.
    """
    if config.plan_file is not None:
        plan = Plan.load(config.plan_file).unlowered()
        if (plan.placement.num_ranks, plan.num_micro) != (num_ranks, num_micro):
            raise ConfigError(
                f"{config.plan_file} is a plan for {plan.placement.num_ranks} ranks and {plan.num_micro} "
                f"micro-batches, but the job has {num_ranks} pipeline ranks and {num_micro} micro-batches"
            )
        placed = costs(plan.placement)
    else:
        placed = costs(placement_of(config.schedule, num_ranks, config.stages_per_rank))
        plan = make_plan(
            config.schedule,
            num_ranks,
            num_micro,
            placed,
            optimize=config.optimize,
            activation_cap=config.activation_cap,
            split_backward=config.split_backward is not False,
            stages_per_rank=config.stages_per_rank,
        )
    return lowered_plan(plan, config, placed, exact)


def lowered_plan(plan: Plan, config: DualPipeConfig, costs: CostModel, exact: bool = False) -> Plan:
    """Add copies to host memory where the configuration wants them, lower and verify a plan.

    Args:
        plan: of compute ops.
        config: says how many activations are offloaded.
        costs: of the stages of its placement.
        exact: as of `offload`.

    Raises:
        PlanError: it is not sound, does not keep within the configuration's cap, or see `exact`.
    """
    lowered = lower(offload(plan, config.offload_activations, costs, exact))
    verify(lowered, activation_cap=config.activation_cap)
    return lowered


def agree(plan: Plan, device: torch.device) -> None:
    """Check that every rank has made the same plan. Collective over all ranks.

    Raises:
        PlanError: the digests differ.
    """
    digest = torch.tensor([int(plan.digest()[:15], 16)], dtype=torch.int64, device=device)
    low, high = digest.clone(), digest.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        text = "the ranks have made different plans: give all of them the same configuration and plan file"
        raise PlanError(text, everywhere=True)
