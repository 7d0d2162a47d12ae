"""Estimates of whole jobs: memory and speed of a model on a cluster, for each schedule, before anything is run.

FLOPs, bytes and bandwidths give the times of each layer's forward and backward; the layers are cut into stages of equal
work; the simulator gives the step. Where F and B run as a pair, expert all-to-all hides under computation, elsewhere it
is paid in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

from ...errors import ConfigError, PlanError
from ..cuts.balanced import balance_pairs
from ..cuts.together import kept_together
from ..orders.registry import with_stages
from ..placement import Placement
from ..search.make_plan import make_plan
from ..timing.costs import CostModel
from ..timing.simulate import peak_bytes, simulate
from .hardware import Hardware
from .model_shape import LayerShape, ModelShape, held_params


@dataclass(frozen=True)
class Job:
    """How a model is trained.

    Args:
        gpus: all of them.
        ranks: pipeline ranks; every group of so many GPUs is a replica.
        experts: expert-parallel ranks, which lie across replicas.
        micro_batches: micro-batches of one pipeline.
        sequences: sequences of a micro-batch.
        length: tokens of a sequence.
        fp8: matrix products and dispatched tokens in FP8, where the hardware has it.
        deep_ep: tokens travel by DeepEP, once to each rank or node of their experts; otherwise by all-to-all, in bf16,
            once for each expert.
    """

    gpus: int
    ranks: int
    experts: int
    micro_batches: int
    sequences: int = 1
    length: int = 4096
    fp8: bool = True
    deep_ep: bool = True

    def __post_init__(self) -> None:
        if min(self.gpus, self.ranks, self.experts, self.micro_batches, self.sequences, self.length) < 1:
            raise ConfigError(f"counts of a job must be at least 1: {self}")
        if self.gpus % self.ranks:
            raise ConfigError(f"{self.gpus} GPUs are no multiple of {self.ranks} pipeline ranks: choose --ranks")
        if self.replicas % self.experts:
            raise ConfigError(
                f"{self.gpus} GPUs and {self.ranks} pipeline ranks make {self.replicas} replicas, no multiple of "
                f"{self.experts} expert-parallel ranks: choose --expert-parallel"
            )

    @property
    def replicas(self) -> int:
        return self.gpus // self.ranks

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequences * self.length

    @property
    def step_tokens(self) -> int:
        """Of a step, over all replicas."""
        return self.tokens * self.micro_batches * self.replicas


#: How models were trained: pipeline ranks, expert-parallel ranks, sequences of a batch, tokens of a sequence
#: (arXiv 2412.19437, sections 3.2 and 4.2).
PUBLISHED_JOBS = {"deepseek-v3": (16, 64, 15360, 4096)}
#: GPU-hours for 10^12 tokens that were published, with the hardware: arXiv 2412.19437, section 1.
PUBLISHED_HOURS = {("deepseek-v3", "h800"): 180e3}


@dataclass(frozen=True)
class Seconds:
    """A layer's times for one micro-batch: computation of F, I and W, and the all-to-all of a forward or a backward."""

    f: float
    i: float
    w: float
    comm: float


@dataclass(frozen=True)
class Estimate:
    """What one schedule makes of a job; None for everything where it is impossible, with the reason.

    Args:
        schedule: its name.
        reason: why it is impossible, or "".
        step: seconds, reduction of gradients and optimizer included.
        bubble: part of the makespan that the idlest rank is idle.
        memory: bytes of the fullest rank.
        tokens_per_second: of one GPU.
    """

    schedule: str
    reason: str = ""
    step: float | None = None
    bubble: float | None = None
    memory: int | None = None
    tokens_per_second: float | None = None

    @property
    def gpu_hours(self) -> float | None:
        """For 10^12 tokens."""
        return None if self.tokens_per_second is None else 1e12 / self.tokens_per_second / 3600


def make_job(
    model: ModelShape,
    gpus: int,
    ranks: int | None = None,
    experts: int | None = None,
    micro_batches: int | None = None,
    sequences: int = 1,
    length: int | None = None,
    fp8: bool = True,
    deep_ep: bool = True,
) -> Job:
    """A job; what is None is taken from how the model was trained, where that was published.

    Raises:
        ConfigError: a count is missing, or they do not fit together.
    """
    if gpus < 1 or (ranks is not None and ranks < 1):
        raise ConfigError(f"counts must be at least 1, got {gpus} GPUs and {ranks} pipeline ranks")
    known = PUBLISHED_JOBS.get(model.name)
    if ranks is None and known:
        ranks = known[0]
    if ranks is None:
        raise ConfigError(f"say how many pipeline ranks {model.name} has: --ranks N")
    if experts is None:
        counts = [layer.num_experts for layer in model.layers if layer.experts]
        experts = known[1] if known else max(1, gcd(gpus // ranks, 8, *counts)) if counts else 1
    check_shared(model, experts)
    length = length or (known[3] if known else 4096)
    if micro_batches is None and known:
        micro_batches = max(1, known[2] * ranks // (gpus * sequences))
    if micro_batches is None:
        raise ConfigError(f"say how many micro-batches a pipeline of {model.name} runs in a step: --micro-batches M")
    return Job(gpus, ranks, experts, micro_batches, sequences, length, fp8, deep_ep)


def check_shared(model: ModelShape, experts: int) -> None:
    """Whether so many ranks can share the experts of each layer.

    Raises:
        ConfigError: they cannot.
    """
    counts = {layer.num_experts for layer in model.layers if layer.experts}
    if experts > 1 and not counts:
        raise ConfigError(f"{model.name} has no experts to share: leave --expert-parallel out")
    for count in counts:
        if count % experts:
            raise ConfigError(f"{experts} ranks cannot share {count} experts of {model.name}: choose --expert-parallel")


def _compute_share(layer: LayerShape, hardware: Hardware) -> float:
    """Part of the SMs that is left to computation."""
    return 1 - hardware.comm_sms / hardware.sms if layer.rows else 1.0


def product_rate(layer: LayerShape, job: Job, hardware: Hardware) -> float:
    """FLOP/s that matrix products of a layer sustain; embedding and heads stay in bf16."""
    fp8 = job.fp8 and hardware.fp8 > 0 and layer.context > 0
    peak = hardware.fp8 * hardware.fp8_efficiency if fp8 else hardware.bf16 * hardware.bf16_efficiency
    return peak * _compute_share(layer, hardware)


def layer_seconds(layer: LayerShape, job: Job, hardware: Hardware) -> Seconds:
    """Times of a layer."""
    share = _compute_share(layer, hardware)
    imbalance = hardware.imbalance if job.experts > 1 else 1.0
    product = 2 * (layer.dense + layer.routed * imbalance) * job.tokens / product_rate(layer, job, hardware)
    core = 2 * layer.context * job.length / 2 * job.tokens / (hardware.bf16 * hardware.attention_efficiency * share)
    moved = 2 * layer.moved * job.tokens / (hardware.bandwidth * hardware.memory_efficiency)
    comm = 0.0
    if job.experts > 1:
        inside = job.experts <= hardware.gpus_per_node and hardware.nvlink > 0
        link = (hardware.nvlink if inside else hardware.network) * hardware.network_efficiency
        comm = all_to_all_bytes(layer, job, hardware) / link
    # The attention core's backward has five products for the forward's two.
    return Seconds(product + core + moved, product + 2.5 * core + 2 * moved, product, comm)


def all_to_all_bytes(layer: LayerShape, job: Job, hardware: Hardware) -> float:
    """Bytes that a rank sends in the dispatch and the combine of one forward, with even loads: within one node to other
    ranks, else to other nodes. Those of a backward are as many."""
    nodes = -(-job.experts // hardware.gpus_per_node)
    places = nodes if nodes > 1 else job.experts
    copies = layer.top_k * (1 - 1 / places)
    if job.deep_ep:  # to each place that any of its experts falls on
        copies = (places - 1) * (1 - (1 - 1 / places) ** layer.top_k)
        if layer.groups:
            copies = min(copies, layer.groups * (1 - 1 / places))
    dispatched = 1 if job.fp8 and job.deep_ep and hardware.fp8 else 2
    return layer.rows * copies * (dispatched + 2) * job.tokens


def cut_model(model: ModelShape, placement: Placement, weights: Sequence[float]) -> list[int]:
    """Bounds of the stages of the cut that gives ranks equal work.

    Args:
        model: what is cut.
        placement: of its stages.
        weights: time of each layer, in any unit.

    Raises:
        PlanError: there are fewer layers than stages.
    """
    return kept_together(balance_pairs(weights, placement), [layer.with_next for layer in model.layers], placement)


def job_bounds(model: ModelShape, placement: Placement, job: Job, hardware: Hardware) -> list[int]:
    """Bounds of the stages of the cut that gives ranks equal work."""
    times = [layer_seconds(layer, job, hardware) for layer in model.layers]
    return cut_model(model, placement, [t.f + t.i + t.w for t in times])


def stage_costs(
    model: ModelShape, placement: Placement, job: Job, hardware: Hardware, repeated: Sequence[float] = ()
) -> CostModel:
    """Costs of the stages of the cut that gives ranks equal work.

    Args:
        model: what is trained.
        placement: of the stages.
        job: ranks and batch.
        hardware: of the cluster.
        repeated: seconds of each layer's forward that its backward computes again; empty: none.
    """
    times = [layer_seconds(layer, job, hardware) for layer in model.layers]
    bounds = job_bounds(model, placement, job, hardware)
    f, i, w, fb, kept = [], [], [], [], []
    for start, stop in pairwise(bounds):
        held, again = times[start:stop], sum(repeated[start:stop])
        comm = sum(t.comm for t in held)
        compute = sum(t.f + t.i + t.w for t in held) + again
        f.append(sum(t.f for t in held) + comm)
        i.append(sum(t.i for t in held) + again + comm)
        w.append(sum(t.w for t in held))
        fb.append(max(compute, 2 * comm) / hardware.pair_efficiency)
        size = 1 if job.fp8 and hardware.fp8 else 2
        kept.append(sum(layer.kept for layer in model.layers[start:stop]) * size * job.tokens)
    hop = 2 * model.hidden * job.tokens / (hardware.network * hardware.network_efficiency)
    return CostModel(tuple(f), tuple(i), tuple(w), tuple(fb), hop, tuple(kept))


def state_bytes(model: ModelShape, placement: Placement, job: Job, hardware: Hardware) -> tuple[int, float]:
    """Bytes of weights, gradients and optimizer of the fullest rank under ZeRO-1, and seconds of its reduction.

    Weights in bf16 (and FP8), gradients in fp32; of the optimizer fp32 weights and bf16 moments (arXiv 2412.19437,
    section 3.3.2), partitioned over all copies of a stage.
    """
    bounds = job_bounds(model, placement, job, hardware)
    copies = placement.num_directions * job.replicas
    expert_copies = copies // job.experts
    most, slowest = 0.0, 0.0
    for rank in range(placement.num_ranks):
        held = [
            layer for stage in placement.stages_of(rank) for layer in model.layers[bounds[stage] : bounds[stage + 1]]
        ]
        dense = held_params(held)
        routed = sum(layer.experts for layer in held) / job.experts
        weight = 3 if job.fp8 and hardware.fp8 else 2
        state = (dense + routed) * (weight + 4) + 8 * (dense / copies + routed / expert_copies)
        most = max(most, state)
        # Reduce-scatter of fp32 gradients, all-gather of bf16 weights.
        traffic = 6 * (dense * (1 - 1 / copies) + routed * (1 - 1 / expert_copies))
        slowest = max(slowest, traffic / (hardware.network * hardware.network_efficiency))
    return round(most), slowest


def estimate(model: ModelShape, job: Job, hardware: Hardware, stages_per_rank: int | None = None) -> list[Estimate]:
    """Every schedule on the same job; `stages_per_rank` of those that take any number."""
    found = []
    for schedule, known in with_stages(stages_per_rank).items():
        try:
            placement, stages = known.on(job.ranks), known.stages_per_rank
            costs = stage_costs(model, placement, job, hardware)
            plan = make_plan(schedule, job.ranks, job.micro_batches, costs, optimize=True, stages_per_rank=stages)
        except PlanError as error:
            found.append(Estimate(schedule, str(error)))
            continue
        timeline = simulate(plan, costs)
        state, reduction = state_bytes(model, placement, job, hardware)
        step = timeline.makespan + reduction
        memory = state + max(peak_bytes(plan, costs))
        speed = job.step_tokens / step / job.gpus
        found.append(Estimate(schedule, "", step, max(timeline.bubble()) / timeline.makespan, memory, speed))
    return found
