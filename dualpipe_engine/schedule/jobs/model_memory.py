"""Bytes of each rank for a whole model under every schedule, from its shape and a DeepSpeed configuration.

Experts are divided by the ranks that share them, and their gradients and optimizer state by the copies of a share.
Activations are what autograd keeps of layers with memory-efficient attention and even loads of experts, less what is
computed again by name; from I to W the inputs of matrix products and their gradients. Stages are cut so that ranks have
equal work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ...errors import ConfigError, PlanError
from ..orders.registry import SCHEDULES, with_stages
from ..passes.offload import offload
from ..placement import Placement
from ..search.make_plan import make_plan
from ..timing.costs import UNIT, CostModel
from ..timing.simulate import peak_bytes
from .activations import Names, unknown_names
from .job import Job, check_heads, check_parts, check_shared
from .memory import STOCK, Memory, MemoryRow, Training, state_of
from .model_shape import LayerShape, ModelShape
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


def layer_activations(layer: LayerShape, width: int, recompute: Names = (), fp8: bool = False) -> int:
    """Bytes of a token that autograd keeps from a layer's forward to its backward.

    Args:
        layer: the layer.
        width: bytes of an element of the weights.
        recompute: names of modules that are computed again.
        fp8: see `Flow.kept`.
    """
    return sum(layer.flow(width).kept(recompute, width, fp8).values())


def with_bytes(
    costs: CostModel,
    model: ModelShape,
    bounds: Sequence[int],
    tokens: int,
    width: int,
    recompute: Names = (),
    fp8: bool = False,
) -> CostModel:
    """The costs with the bytes of activations of the stages of a cut, from F to I and from I to W.

    Args:
        costs: seconds.
        model: what is trained.
        bounds: of the stages.
        tokens: of a micro-batch.
        width: see `layer_activations`.
        recompute: see `layer_activations`.
        fp8: see `layer_activations`.
    """

    def of_stages(of_token: Sequence[int]) -> tuple[int, ...]:
        return tuple(tokens * sum(of_token[start:stop]) for start, stop in pairwise(bounds))

    kept = of_stages([layer_activations(layer, width, recompute, fp8) for layer in model.layers])
    pending = of_stages([layer.flow(width).pending(width, fp8) for layer in model.layers])
    return replace(costs, activation_bytes=kept, pending_bytes=pending)


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
    stages_per_rank: int | None = None,
    offload_activations: bool | int = False,
    recompute: Names = (),
) -> list[MemoryRow]:
    """Stock 1F1B, then every schedule in its reference order.

    Args:
        model: what is trained.
        training: what is kept for a parameter.
        shape: ranks and batch.
        stages_per_rank: of the schedules that take any number; None: their own.
        offload_activations: see `passes.offload`; stock 1F1B does not.
        recompute: names of modules that are computed again; stock 1F1B does not.

    Raises:
        ConfigError: the model's experts or sequences cannot be shared so, or a name matches nothing.
    """
    check_shared(model, shape.experts)
    check_heads(model)
    check_names(model, recompute)
    rows, known = [], with_stages(stages_per_rank)
    for name in (STOCK, *SCHEDULES):
        schedule = "1f1b" if name == STOCK else name
        if name == STOCK and shape.sequence_parallel > 1:
            rows.append(MemoryRow(name, reason="DeepSpeed's own pipeline engine shares no sequences"))
            continue
        try:
            placement, stages = known[schedule].on(shape.ranks), known[schedule].stages_per_rank
            bounds = bounds_of(model, placement, shape)
            again = () if name == STOCK else recompute
            costs = with_bytes(UNIT, model, bounds, shape.tokens, training.weights, again)
            plan = make_plan(schedule, shape.ranks, shape.micro_batches, costs, stages_per_rank=stages)
            peaks = peak_bytes(offload(plan, name != STOCK and offload_activations, costs), costs)
        except PlanError as error:
            rows.append(MemoryRow(name, reason=str(error)))
            continue
        kept = training.stock if name == STOCK else training
        rows.append(MemoryRow(name, stages_memory(model, bounds, placement, kept, shape, peaks)))
    return rows


def bounds_of(model: ModelShape, placement: Placement, shape: Shape) -> list[int]:
    """Bounds of the stages: stage s has layers bounds[s] to bounds[s + 1] - 1."""
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
