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
from ...runtime.observer import Observer
from ...runtime.recompute import Recompute
from ...runtime.weight_grad import DeferredWeightGrads, install, uninstall
from ...schedule.orders.paired import paired_plan
from ...schedule.passes.lower import lower
from ...schedule.plan import Plan
from ...schedule.progress import waiting
from ...schedule.search.make_plan import make_plan
from ...schedule.timeline import Span, Timeline
from ...schedule.timing.costs import CostModel
from ...schedule.timing.from_timelines import measured_costs
from ..batches.feed import BatchFeed
from ..placing.experts import connected_experts
from ..placing.grid import Place
from ..placing.partition import same_random_state
from ..placing.stages import has_phases, make_chunk, needs_input_gradient
from .link_probe import transfer_seconds

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
) -> CostModel:
    """Seconds and activation bytes of each stage of the linear cut, and seconds of a transfer.

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
        saved = _SavedBytes(chunk, module)
        with waiting():
            group, edges_of = module._grid.pp_proc_group, place.placement.edges()
            transport = transport_of(group)(place.pipeline, stage, group, device, edges=edges_of, timeout_s=timeout_s)
        edges = Edges(transport, device, timeout_s, dynamic_shape=module.dynamic_shape)
        bench = _Bench(module, place, chunk, edges, device, _sums_of(module, sums))
        try:
            bench.run(make_plan("zb1p" if split_backward else "1f1b", ranks, num_micro), next_batch)
            if any(from_all(chunk.brings_overlap)):
                bench.run(paired_plan(ranks, num_micro), next_batch)
        finally:
            uninstall(view)
        sizes = from_all(edges.message_bytes(stage), group)
        hop = transfer_seconds(place, transport, sizes, device, timeout_s)
        dist.barrier()  # nobody takes from a rank that has gone on
        transport.close()
    return _same_on_all(place, measured_costs([Timeline(ranks, bench.spans)], ranks).at(stage), saved.total, hop)


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
    ) -> None:
        self._module, self._place, self._device = module, place, device
        self._observer = Observer(place.rank, device)
        self._executor = Executor(place.rank, {place.rank: chunk}, edges, self._observer, _Adding(sums))
        self._side = side_stream(device)
        self.spans: list[Span] = []

    def run(self, plan: Plan, next_batch: Callable[[], Nest]) -> None:
        """Run a plan once to warm up, and `BATCHES` times."""
        lowered, gradient = lower(plan), needs_input_gradient(self._module)
        for number in range(BATCHES + 1):
            dist.barrier()
            feed = BatchFeed(
                self._place, plan.num_micro, next_batch, self._device, side=self._side, input_gradient=gradient
            )
            self._executor.run(lowered, feed)
            if number:
                self.spans.extend(self._observer.spans())


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


def _same_on_all(place: Place, seconds: tuple[float, ...], size: int, hop: float) -> CostModel:
    """Mean times over the replicas, the largest activations, the slowest hop."""
    ranks = len(place.pipeline)
    times, sizes, hops = [[0.0] * 4 for _ in range(ranks)], [0] * ranks, []
    of_ranks = from_all((place.rank, seconds, size, hop))
    share = ranks / len(of_ranks)
    for stage, seconds, size, hop in of_ranks:
        times[stage] = [total + each * share for total, each in zip(times[stage], seconds, strict=True)]
        sizes[stage] = max(sizes[stage], size)
        hops.append(hop)
    f, i, w, fb = (tuple(column) for column in zip(*times, strict=True))
    return CostModel(f, i, w, fb, comm=max(hops), activation_bytes=tuple(sizes))


class _SavedBytes:
    """Counts the bytes that the first forward of a chunk leaves behind for its backward, parameters aside.

    Attributes:
        total: the bytes.
    """

    def __init__(self, chunk: StageChunk, module: PipelineModule) -> None:
        self.total = 0
        self._seen = {param.untyped_storage().data_ptr() for param in module.parameters()}
        forward = chunk.forward

        def counted(*args: Nest) -> Nest:
            vars(chunk).pop("forward")
            with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
                return forward(*args)

        vars(chunk)["forward"] = counted

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor.detach()


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
