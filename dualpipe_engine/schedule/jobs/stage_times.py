"""Times of a job's stages, from FLOPs, bytes and bandwidths: each layer's forward and backward, stages of equal work.

Where F and B run as a pair, all-to-alls hide under computation, elsewhere they are paid in full. Those of attention
between ranks that share sequences do not hide in layers of transformers that are computed again as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..cuts.balanced import balance_pairs
from ..cuts.fastest import candidates
from ..cuts.together import kept_together
from ..placement import Placement
from ..timing.costs import CostModel
from .hardware import Hardware
from .job import Job
from .model_shape import LayerShape, ModelShape, held_params


@dataclass(frozen=True)
class Seconds:
    """A layer's times for one micro-batch: computation of F, I and W, and of a forward or a backward the all-to-all of
    experts, and that of heads."""

    f: float
    i: float
    w: float
    comm: float
    heads: float = 0.0


def _compute_share(layer: LayerShape, hardware: Hardware) -> float:
    """Part of the SMs that is left to computation."""
    return 1 - hardware.comm_sms / hardware.sms if layer.rows or layer.exchanged else 1.0


def in_fp8(job: Job, hardware: Hardware) -> bool:
    """Whether matrix products of blocks run in FP8."""
    return job.fp8 and hardware.fp8 > 0


def product_rate(layer: LayerShape, job: Job, hardware: Hardware) -> float:
    """FLOP/s that matrix products of a layer sustain; embedding and heads stay in bf16."""
    fp8 = in_fp8(job, hardware) and layer.context > 0
    peak = hardware.fp8 * hardware.fp8_efficiency if fp8 else hardware.bf16 * hardware.bf16_efficiency
    return peak * _compute_share(layer, hardware)


def layer_seconds(layer: LayerShape, job: Job, hardware: Hardware) -> Seconds:
    """Times of a layer."""
    share = _compute_share(layer, hardware)
    imbalance = hardware.imbalance if job.experts > 1 else 1.0
    product = 2 * (layer.dense + layer.routed * imbalance) * job.tokens / product_rate(layer, job, hardware)
    core = 2 * layer.context * job.length / 2 * job.tokens / (hardware.bf16 * hardware.attention_efficiency * share)
    moved = 2 * layer.moved * job.tokens / (hardware.bandwidth * hardware.memory_efficiency)
    comm = all_to_all_bytes(layer, job, hardware) / _link(job.experts, hardware) if job.experts > 1 else 0.0
    heads = heads_bytes(layer, job, hardware) / _link(job.sequence_parallel, hardware)
    # The attention core's backward has five products for the forward's two.
    return Seconds(product + core + moved, product + 2.5 * core + 2 * moved, product, comm, heads)


def _link(ranks: int, hardware: Hardware) -> float:
    """Bytes a second of an all-to-all between so many neighbours."""
    inside = ranks <= hardware.gpus_per_node and hardware.nvlink > 0
    return (hardware.nvlink if inside else hardware.network) * hardware.network_efficiency


def _places(ranks: int, hardware: Hardware) -> int:
    """Where an all-to-all between so many neighbours sends to: nodes, or the ranks of the one node."""
    nodes = -(-ranks // hardware.gpus_per_node)
    return nodes if nodes > 1 else ranks


def heads_bytes(layer: LayerShape, job: Job, hardware: Hardware) -> float:
    """Bytes, in bf16, that a rank sends in the two exchanges of one forward's attention between ranks that share
    sequences: within one node to other ranks, else to other nodes. Those of a backward are as many."""
    return 2 * layer.exchanged * (1 - 1 / _places(job.sequence_parallel, hardware)) * job.tokens


def all_to_all_bytes(layer: LayerShape, job: Job, hardware: Hardware) -> float:
    """Bytes that a rank sends in the dispatch and the combine of one forward, with even loads: within one node to other
    ranks, else to other nodes. Those of a backward are as many."""
    places = _places(job.experts, hardware)
    copies = layer.top_k * (1 - 1 / places)
    if job.deep_ep:  # to each place that any of its experts falls on
        copies = (places - 1) * (1 - (1 - 1 / places) ** layer.top_k)
        if layer.groups:
            copies = min(copies, layer.groups * (1 - 1 / places))
    dispatched = 1 if job.deep_ep and in_fp8(job, hardware) else 2
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
    return cut_model(model, placement, _work(model, job, hardware))


def job_cuts(model: ModelShape, placement: Placement, job: Job, hardware: Hardware) -> list[tuple[int, ...]]:
    """Bounds of the stages of some cuts, first of the one that gives ranks equal work; see `cuts.fastest`."""
    together = [layer.with_next for layer in model.layers]
    cuts = candidates(_work(model, job, hardware), placement)
    return list(dict.fromkeys(tuple(kept_together(bounds, together, placement)) for bounds in cuts))


def _work(model: ModelShape, job: Job, hardware: Hardware) -> list[float]:
    """Seconds of each layer's computation."""
    times = [layer_seconds(layer, job, hardware) for layer in model.layers]
    return [t.f + t.i + t.w for t in times]


def stage_costs(
    model: ModelShape,
    bounds: Sequence[int],
    job: Job,
    hardware: Hardware,
    repeated: Sequence[float] = (),
    whole: bool = False,
) -> CostModel:
    """Seconds of the stages of a cut; for bytes see `model_memory.with_bytes`.

    Args:
        model: what is trained.
        bounds: of the stages.
        job: ranks and batch.
        hardware: of the cluster.
        repeated: seconds of each layer's forward that its backward computes again; empty: none.
        whole: layers are computed again as a whole.
    """
    times = [layer_seconds(layer, job, hardware) for layer in model.layers]
    f, i, w, fb = [], [], [], []
    for start, stop in pairwise(bounds):
        held, again = times[start:stop], sum(repeated[start:stop])
        heads = sum(t.heads for t in held)
        comm = sum(t.comm for t in held) + heads
        waited = 2 * heads if whole and not model.own else 0.0
        compute = sum(t.f + t.i + t.w for t in held) + again
        f.append(sum(t.f for t in held) + comm)
        i.append(sum(t.i for t in held) + again + comm)
        w.append(sum(t.w for t in held))
        fb.append(max(compute, 2 * comm - waited) / hardware.pair_efficiency + waited)
    hop = 2 * model.hidden * job.tokens / (hardware.network * hardware.network_efficiency)
    return CostModel(tuple(f), tuple(i), tuple(w), tuple(fb), hop)


def held_by(rank: int, model: ModelShape, bounds: Sequence[int], placement: Placement) -> tuple[int, int]:
    """Parameters of a rank: those that all replicas have, and routed experts, before they are shared."""
    spans = [(bounds[stage], bounds[stage + 1]) for stage in placement.stages_of(rank)]
    held = [layer for start, stop in spans for layer in model.layers[start:stop]]
    return held_params(held), sum(layer.experts for layer in held)


def reduction_seconds(
    model: ModelShape, bounds: Sequence[int], placement: Placement, job: Job, hardware: Hardware
) -> float:
    """Seconds of the slowest rank's reduction under ZeRO-1 over all copies of a stage.

    These are a reduce-scatter of fp32 gradients and an all-gather of bf16 weights.
    """
    traffic, copies = [], placement.num_directions * job.replicas
    for rank in range(placement.num_ranks):
        dense, routed = held_by(rank, model, bounds, placement)
        traffic.append(6 * (dense * (1 - 1 / copies) + routed / job.experts * (1 - job.experts / copies)))
    return max(traffic) / (hardware.network * hardware.network_efficiency)
