"""Probe: how long a job's real stages take, before the model is placed.

The stages of the linear cut, on which DeepSpeed has built the PipelineModule, run a few batches of a zero-bubble order
through the same chunks, edges and weight-gradient split as in training, all ranks at once. Weights, buffers, random
states and the model's seeds are left as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import nn

from ...comm.device import side_stream
from ...comm.from_all import from_all
from ...comm.nest import Nest
from ...comm.p2p import Edges
from ...comm.transports import transport_of
from ...runtime.chunk import StageChunk
from ...runtime.executor import Executor
from ...runtime.held import added_bytes, held_behind
from ...runtime.observer import Observer
from ...runtime.recompute import Recompute
from ...runtime.weight_grad import DeferredWeightGrads, install, uninstall
from ...schedule.op import F, I
from ...schedule.orders.paired import paired_plan
from ...schedule.passes.lower import lower
from ...schedule.plan import Plan
from ...schedule.progress import waiting
from ...schedule.search.make_plan import make_plan
from ...schedule.timeline import Span, Timeline
from ...schedule.timing.costs import CostModel
from ...schedule.timing.from_timelines import measured_costs
from ..batches.feed import BatchFeed
from ..batches.shards import Shards
from ..checks.agreement import refused_everywhere
from ..placing.experts import connected_experts
from ..placing.grid import Place
from ..placing.partition import same_random_state
from ..placing.stages import has_phases, make_chunk, needs_input_gradient
from .link_probe import copy_seconds, transfer_seconds

BATCHES = 3  #: measured, after one that warms up


def probe_stages(
    module: PipelineModule,
    place: Place,
    next_batch: Callable[[], Nest],
    num_micro: int,
    *,
    device: torch.device,
    split_backward: bool,
    overlap: bool,
    timeout_s: float,
    sums: torch.dtype | None = None,
    recomputed: dict[str, nn.Module] | None = None,
    shards: Shards | None = None,
) -> CostModel:
    """Seconds and activation bytes of each stage of the linear cut, seconds of the copy of these to host memory, and
    seconds of a transfer.

    Collective over all ranks; every rank returns the same.

    Args:
        module: a PipelineModule as its constructor left it.
        place: this rank's place on the linear placement.
        next_batch: reads the next micro-batch `(inputs, labels)`; it must not run dry.
        num_micro: micro-batches of a training batch; the probe takes at most two for each rank.
        device: where the stages run.
        split_backward: measure I and W apart; otherwise I stands for the whole backward.
        overlap: measure F&B where the stages bring an overlapped pair.
        timeout_s: seconds after which a transfer is given up.
        sums: of what dtype the optimizer keeps sums of its own, to which W adds; None: autograd's do.
        recomputed: modules of this rank that are computed again in the backward, by name.
        shards: cuts the micro-batches; None: they stay whole.
    """
    stage, ranks = place.rank, len(place.pipeline)
    num_micro = max(1, min(num_micro, 2 * ranks))
    with connected_experts(module), _untouched(module):
        view = copy.copy(module)
        store = DeferredWeightGrads() if split_backward else None
        if store is not None:
            install(view, store)
        recompute = Recompute(recomputed) if recomputed else None
        if recompute is not None:
            recompute.install()
        with refused_everywhere():
            chunk = make_chunk(
                view,
                stage,
                by_phases=overlap and has_phases(module),
                timeout_s=timeout_s,
                recompute=recompute,
                is_last=stage == ranks - 1,
                loss_fn=module.loss_fn if stage == ranks - 1 else None,
                store=store,
                overlap=overlap,
            )
        with waiting():
            group, edges_of = module._grid.pp_proc_group, place.placement.edges()
            transport = transport_of(group)(place.pipeline, stage, group, device, edges=edges_of, timeout_s=timeout_s)
        edges = Edges(transport, device, timeout_s, dynamic_shape=module.dynamic_shape)
        bench = _Bench(module, place, chunk, edges, device, _sums_of(module, sums), shards)
        try:
            plan = make_plan("zb1p" if split_backward else "1f1b", ranks, num_micro)
            bench.run(plan, next_batch)
            kept, pending = bench.held(plan, next_batch)
            if any(from_all(chunk.brings_overlap)):
                bench.run(paired_plan(ranks, num_micro), next_batch)
        finally:
            uninstall(view)
        sizes = from_all(edges.message_bytes(stage), group)
        hop = transfer_seconds(place, transport, sizes, device, timeout_s)
        dist.barrier()  # nobody takes from a rank that has gone on
        transport.close()
        copy_s = copy_seconds(kept, device, timeout_s)
    costs = measured_costs([Timeline(ranks, bench.spans)], ranks)
    return _same_on_all(place, (*costs.at(stage), copy_s), (kept, pending), hop)


class _Bench:
    """Runs plans on one stage of the linear cut.

    Attributes:
        spans: of the ops that were measured.
    """

    def __init__(
        self,
        module: PipelineModule,
        place: Place,
        chunk: StageChunk,
        edges: Edges,
        device: torch.device,
        sums: Sequence[tuple[torch.Tensor, torch.Tensor]],
        shards: Shards | None,
    ) -> None:
        self._shards = shards
        self._module, self._place, self._device, self._sums = module, place, device, sums
        self._observer = Observer(place.rank, device)
        self._executor = Executor(place.rank, {place.rank: chunk}, edges, self._observer, _Adding(sums))
        self._side = side_stream(device)
        self.spans: list[Span] = []

    def run(self, plan: Plan, next_batch: Callable[[], Nest]) -> None:
        """Run a plan once to warm up, and `BATCHES` times."""
        for number in range(BATCHES + 1):
            self._batch(plan, next_batch)
            if number:
                self.spans.extend(self._observer.spans())

    def held(self, plan: Plan, next_batch: Callable[[], Nest]) -> tuple[int, int]:
        """Run a plan once: bytes that a micro-batch keeps on the stage from F to I, and from I to W."""
        own = [*self._module.parameters(), *self._module.buffers(), *(total for _, total in self._sums)]
        with held_behind(self._executor, lambda: own) as found:
            self._batch(plan, next_batch)
        added = added_bytes(found)
        kept = max(0, added[F, self._place.rank])
        return kept, max(0, kept + added.get((I, self._place.rank), 0))

    def _batch(self, plan: Plan, next_batch: Callable[[], Nest]) -> None:
        dist.barrier()
        gradient = needs_input_gradient(self._module)
        feed = BatchFeed(
            self._place,
            plan.num_micro,
            next_batch,
            self._device,
            side=self._side,
            input_gradient=gradient,
            shards=self._shards,
        )
        self._executor.run(lower(plan), feed)


class _Adding:
    """The executor's `Tail` that adds gradients to sums, as the optimizer's would, and does nothing else.

    Args:
        sums: (parameter, its sum).
    """

    def __init__(self, sums: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._sums = sums

    def accumulate(self, stage: int) -> None:
        for param, total in self._sums:
            if param.grad is not None:
                total.add_(param.grad)
                param.grad = None

    def reduce(self, stage: int) -> None:
        pass

    def step(self, losses: Mapping[int, torch.Tensor]) -> None:
        pass


def _sums_of(module: torch.nn.Module, dtype: torch.dtype | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if dtype is None:
        return []
    return [(param, torch.zeros_like(param, dtype=dtype)) for param in module.parameters() if param.requires_grad]


def _same_on_all(place: Place, seconds: tuple[float, ...], sizes: tuple[int, int], hop: float) -> CostModel:
    """Mean times over the replicas, the largest activations, the slowest copies and hop."""
    ranks = len(place.pipeline)
    times, bytes_of, hops = [[0.0] * 5 for _ in range(ranks)], [(0, 0)] * ranks, []
    of_ranks = from_all((place.rank, seconds, sizes, hop))
    share = ranks / len(of_ranks)
    for stage, seconds, sizes, hop in of_ranks:
        *mean, slowest = times[stage]
        *found, copy_s = seconds
        mean = [total + each * share for total, each in zip(mean, found, strict=True)]
        times[stage] = [*mean, max(slowest, copy_s)]
        bytes_of[stage] = max(bytes_of[stage][0], sizes[0]), max(bytes_of[stage][1], sizes[1])
        hops.append(hop)
    f, i, w, fb, copy_of = (tuple(column) for column in zip(*times, strict=True))
    kept, pending = (tuple(column) for column in zip(*bytes_of, strict=True))
    return CostModel(f, i, w, fb, max(hops), activation_bytes=kept, pending_bytes=pending, copy=copy_of)


@contextmanager
def _untouched(module: PipelineModule) -> Iterator[None]:
    """Train in the body, then put back buffers, mode, seeds and random states, and drop the gradients."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    training, offset = module.training, module.micro_offset
    module.train()
    try:
        with same_random_state():
            yield
    finally:
        for buffer, before in buffers:
            buffer.data.copy_(before)
        module.train(training)
        module.micro_offset = offset
        for param in module.parameters():
            param.grad = None
