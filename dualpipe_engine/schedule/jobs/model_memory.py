"""Bytes of each rank for a whole model under every schedule, from its shape and a DeepSpeed configuration.

Experts are divided by the ranks that share them, and their gradients and optimizer state by the copies of a share.
Activations are what autograd keeps of layers with memory-efficient attention and even loads of experts, less what is
computed again; from I to W the inputs of matrix products and their gradients. Stages are cut so that ranks have equal
work, or as the configuration says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ...errors import ConfigError, PlanError
from ..cuts.counts import bounds_of_counts
from ..orders.registry import SCHEDULES, STOCK
from ..placement import Placement
from ..plan import Plan
from ..timing.costs import UNIT, CostModel
from ..timing.simulate import peak_bytes
from .activations import Names, unknown_names
from .asked import NOTHING, Asked
from .checkpointed import Keeping, has_phases, layer_activations
from .job import Job, check_heads, check_parts, check_shared
from .memory import Memory, MemoryRow, Training, state_of
from .model_shape import ModelShape
from .stage_times import cut_model, held_by

TRAINING = Training(2, 4, 12, True, False, 6)
"""Of jobs on a cluster: bf16 with fp32 gradients, Adam and ZeRO-1."""

Parts = dict[Names, dict[str, int]]
"""Names of what is computed again -> bytes of each part that are left."""


@dataclass(frozen=True)
class Shape:
    """How the ranks and a batch are divided.

    Args:
        ranks: pipeline ranks.
        micro_batches: of one pipeline.
        replicas: data-parallel pipelines.
        experts: ranks that share the experts of a layer.
        sequences: of a micro-batch.
        length: tokens of a sequence.
        sequence_parallel: ranks that share each sequence.

    Raises:
        ConfigError: the replicas cannot share experts or sequences so.
    """

    ranks: int
    micro_batches: int
    replicas: int = 1
    experts: int = 1
    sequences: int = 1
    length: int = 4096
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if min(self.experts, self.sequences, self.length, self.micro_batches) < 1:
            raise ConfigError(f"counts must be at least 1: {self}")
        if self.replicas % self.experts:
            raise ConfigError(
                f"experts are shared by {self.experts} ranks, but the pipeline has {self.replicas} replicas: their "
                f"number must be a multiple of {self.experts}; say --replicas D"
            )
        check_parts(self.replicas, self.sequence_parallel, self.length)

    @property
    def tokens(self) -> int:
        """Of a micro-batch, those of a rank."""
        return self.sequences * self.length // self.sequence_parallel


def with_bytes(costs: CostModel, model: ModelShape, bounds: Sequence[int], tokens: int, keeping: Keeping) -> CostModel:
    """The costs with the bytes of activations of the stages of a cut, from F to I and from I to W.

    Args:
        costs: seconds.
        model: what is trained.
        bounds: of the stages.
        tokens: of a micro-batch.
        keeping: how they are kept.
    """
    kept, pending = [], []
    for start, stop in pairwise(bounds):
        layers = model.layers[start:stop]
        kept.append(tokens * keeping.of_stage(model, layers))
        pending.append(tokens * sum(layer.flow(keeping.width).pending(keeping.width, keeping.fp8) for layer in layers))
    return replace(costs, activation_bytes=tuple(kept), pending_bytes=tuple(pending))


def at_peak(
    plan: Plan, costs: CostModel, model: ModelShape, bounds: Sequence[int], tokens: int, keeping: Keeping
) -> list[int]:
    """Bytes of activations on each rank at its peak, with the largest group of layers that is computed again.

    Args:
        plan: what runs.
        costs: with the bytes of its stages.
        model: what is trained.
        bounds: of the stages.
        tokens: of a micro-batch.
        keeping: how activations are kept.
    """
    again = [keeping.again(model, model.layers[start:stop]) for start, stop in pairwise(bounds)]
    placement, peaks = plan.placement, peak_bytes(plan, costs)
    return [peak + tokens * max(again[stage] for stage in placement.stages_of(rank)) for rank, peak in enumerate(peaks)]


def check_names(model: ModelShape, recompute: Names) -> None:
    """Refuse names that match no module.

    Raises:
        ConfigError: there are some.
    """
    flows = [layer.flow(2) for layer in model.layers]
    if unknown := unknown_names(flows, recompute):
        there = sorted({module.name for flow in flows for module in flow.modules})
        raise ConfigError(
            f'"recompute": no module of {model.name} matches {unknown[0]!r}: there are {", ".join(there)}'
        )


def parts_of(model: ModelShape, shape: Shape, width: int, recompute: Names = ()) -> dict[str, int]:
    """Bytes of one micro-batch that the fullest layer keeps, by parts: norms, attention, experts, ...

    Args:
        model: what is trained.
        shape: ranks and batch.
        width: bytes of an element of the weights.
        recompute: names of modules that are computed again.
    """
    fullest = max((layer for layer in model.layers if layer.context), key=lambda layer: layer_activations(layer, width))
    tokens = shape.tokens
    plain = fullest.flow(width).kept((), width)
    left = fullest.flow(width).kept(recompute, width)
    return {part: left.get(part, 0) * tokens for part in sorted(plain.keys() | left.keys())}


def model_memory(
    model: ModelShape,
    training: Training,
    shape: Shape,
    asked: Asked = NOTHING,
    tiled: ModelShape | None = None,
) -> list[MemoryRow]:
    """Stock 1F1B, then every schedule in its reference order.

    Args:
        model: what is trained.
        training: what is kept for a parameter.
        shape: ranks and batch.
        asked: what the configuration asks of them.
        tiled: the model as all but stock 1F1B run it, see `flows.Tiles`; None: as it is.

    Raises:
        ConfigError: the model's experts or sequences cannot be shared so, a name matches nothing, or activations shall
            leave that DeepSpeed's activation checkpointing keeps.
    """
    check_shared(model, shape.experts)
    check_heads(model)
    check_names(model, asked.recompute)
    if asked.checkpoint_interval and asked.offload_activations and not has_phases(model):
        raise ConfigError(
            '"offload_activations" moves nothing of layers under "activation_checkpoint_interval": leave one out'
        )
    rows = []
    for name in (STOCK, *SCHEDULES):
        if name == STOCK and shape.sequence_parallel > 1:
            rows.append(MemoryRow(name, reason="DeepSpeed's own pipeline engine shares no sequences"))
            continue
        here, run, kept = asked, tiled or model, training
        if name == STOCK:
            here, run, kept = asked.stock, model, training.stock
        try:
            placement = here.placement(name, shape.ranks)
            bounds = bounds_of(run, placement, shape, here.cut)
            keeping = Keeping(kept.weights, here.recompute, here.checkpoint_interval)
            costs = with_bytes(UNIT, run, bounds, shape.tokens, keeping)
            plan = here.plan(name, shape.ranks, shape.micro_batches, costs)
            peaks = at_peak(plan, costs, run, bounds, shape.tokens, keeping)
        except (PlanError, ConfigError) as error:
            rows.append(MemoryRow(name, reason=str(error)))
            continue
        rows.append(MemoryRow(name, stages_memory(run, bounds, placement, kept, shape, peaks)))
    return rows


def bounds_of(
    model: ModelShape, placement: Placement, shape: Shape, cut: tuple[int, ...] | None = None
) -> Sequence[int]:
    """Bounds of the stages: stage s has layers bounds[s] to bounds[s + 1] - 1.

    Args:
        model: what is cut.
        placement: of the stages.
        shape: ranks and batch.
        cut: layers of each stage; None: so that ranks have equal work.

    Raises:
        ConfigError: the cut is for other layers or stages.
    """
    if cut is not None:
        return bounds_of_counts(cut, len(model.layers), placement)
    work = [float(each.dense + each.routed + each.context * shape.length // 2) for each in model.layers]
    return cut_model(model, placement, work)


def stages_memory(
    model: ModelShape,
    bounds: Sequence[int],
    placement: Placement,
    training: Training,
    shape: Shape,
    activations: Sequence[int],
) -> tuple[Memory, ...]:
    """The bytes of each rank for a cut.

    Args:
        model: what is trained.
        bounds: of the stages.
        placement: of the stages.
        training: what is kept for a parameter.
        shape: ranks and batch.
        activations: bytes of them on each rank.
    """
    copies, found = placement.num_directions * shape.replicas, []
    for rank in range(placement.num_ranks):
        dense, routed = held_by(rank, model, bounds, placement)
        params = [(dense, copies), (routed // shape.experts, copies // shape.experts)]
        found.append(state_of(training, params, activations[rank]))
    return tuple(found)


def fullest(
    model: ModelShape, bounds: Sequence[int], placement: Placement, job: Job, activations: Sequence[int]
) -> int:
    """Bytes of the fullest rank of a job on a cluster; for the arguments see `stages_memory`."""
    shape = Shape(
        job.ranks, job.micro_batches, job.replicas, job.experts, job.sequences, job.length, job.sequence_parallel
    )
    return max(each.total for each in stages_memory(model, bounds, placement, TRAINING, shape, activations))
