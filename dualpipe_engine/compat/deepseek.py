"""The interface of DeepSeek's `dualpipe` package on plans, executor and edges of dualpipe_engine.

Code written for that package runs after a change of its imports, on CPU (gloo) and GPU (NCCL). What is easier here:
shapes and dtypes of transfers need not be set, any number of micro-batches from 1 works, and plain layers such as
`nn.Linear` defer their weight gradients by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from ..comm.communicators import matches_by_tag, open_pairs
from ..comm.nest import Nest
from ..comm.p2p import Edges
from ..comm.transport import Transport
from ..comm.transports import PipelineTransport, transport_of
from ..errors import ConfigError
from ..runtime.executor import Executor
from ..runtime.observer import Observer
from ..runtime.weight_grad import install
from ..schedule.orders.registry import placement_of
from ..schedule.passes.lower import forward_only, lower
from ..schedule.passes.verify import verify
from ..schedule.placement import Placement
from ..schedule.plan import Plan
from ..schedule.search.make_plan import make_plan
from .chunk import PairedChunk, SharedStore
from .weight_grad_store import WeightGradStore as DeepSeekStore

TIMEOUT_S = 600.0  #: of a transfer, where the process group does not say another one


def set_p2p_tensor_shapes(shapes: Sequence[Sequence[int]]) -> None:
    """Accepted for code written for DeepSeek's `dualpipe`; shapes are read off the tensors, in every step anew."""


def set_p2p_tensor_dtype(dtype: torch.dtype) -> None:
    """Accepted for code written for DeepSeek's `dualpipe`; every tensor travels in its own dtype."""


class StagePair(nn.Module):
    """The two stages of one pipeline rank, and the step of the whole pipeline: the base of `DualPipe` and `DualPipeV`.

    Args:
        schedule: "dualpipe" or "dualpipev".
        modules: the stages of this rank, in the order of `Placement.stages_of`.
        batch_dim: dimension of inputs, labels and outputs along which micro-batches are cut.
        transport: moves tensors between the ranks.
        num_ranks: pipeline ranks.
        defer_weight_gradients: let the layers of `modules` defer their weight gradients, as `install` does. False
            leaves that to layers that use `utils.WeightGradStore`: for parameters with hooks on the accumulation of
            gradients, which would fire before the gradient is there.
        timeout_s: seconds after which a transfer is given up.

    Raises:
        PlanError: the schedule cannot run on this many ranks.
        ConfigError: there are not two modules.
    """

    def __init__(
        self,
        schedule: str,
        modules: Sequence[nn.Module],
        batch_dim: int,
        transport: Transport,
        num_ranks: int,
        defer_weight_gradients: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        super().__init__()
        if len(modules) != 2:
            raise ConfigError(f"{type(self).__name__} takes the two stages of this rank, got {len(modules)} modules")
        self.module = nn.ModuleList(modules)
        self.batch_dim = batch_dim
        self.num_ranks, self.rank = num_ranks, transport.rank
        self.is_first_rank, self.is_last_rank = self.rank == 0, self.rank == num_ranks - 1
        self._schedule = schedule
        self._placement = placement_of(schedule, num_ranks)
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._last = self._placement.num_stages - 1
        store = SharedStore()
        self._chunks: dict[int, PairedChunk] = {}
        for stage, module in zip(self._placement.stages_of(self.rank), self.module, strict=True):
            if defer_weight_gradients:
                install(module, store)
            self._chunks[stage] = PairedChunk(module, stage, is_last=stage == self._last, store=store)
        device = _device_of(modules)
        self._edges = Edges(transport, device, timeout_s)
        self._executor = Executor(self.rank, self._chunks, self._edges, Observer(self.rank, device))

    def step(
        self,
        *inputs: torch.Tensor | None,
        num_chunks: int = 0,
        criterion: Callable[..., torch.Tensor] | None = None,
        labels: torch.Tensor | Sequence[torch.Tensor | None] = (),
        return_outputs: bool = False,
    ) -> tuple[torch.Tensor | None, Nest]:
        """Run all micro-batches through the pipeline; every rank calls it.

        With gradients enabled each parameter's `grad` gets the sum over the micro-batches that passed through this copy
        of its stage; under `torch.no_grad()` only the forward runs.

        Args:
            inputs: of the micro-batches that enter at this rank, each `[num_entering * micro_batch, ...]` with batch
                dimension `batch_dim`; ignored where none enter.
            num_chunks: micro-batches of the step, the same number on all ranks.
            criterion: `criterion(*outputs, *labels)` is the loss of one micro-batch, a scalar.
            labels: of the micro-batches that leave at this rank, shaped like `inputs`.
            return_outputs: return the outputs of the micro-batches that leave here.

        Returns:
            (losses `[num_leaving]`, outputs concatenated along `batch_dim`; a tuple if a stage makes several). Each is
            None where it was not asked for or no micro-batch leaves.

        Raises:
            ConfigError: `num_chunks` is below 1, does not divide a tensor's batch, a loss is needed and `criterion`
                missing or returning none, or inputs, labels or outputs of a stage are other than tensors.
            PipelineRuntimeError: a transfer failed.
        """
        train = torch.is_grad_enabled()
        if not isinstance(num_chunks, int) or num_chunks < 1:
            raise ConfigError(f"num_chunks must be the number of micro-batches, at least 1, got {num_chunks}")
        entering, leaving = self._ends(0, num_chunks), self._ends(self._last, num_chunks)
        if train and leaving and criterion is None:
            raise ConfigError(f"pipeline rank {self.rank} runs the last stage: training needs a criterion there")
        feed = _Feed(_cut(inputs, entering, self.batch_dim, "inputs"), _cut(labels, leaving, self.batch_dim, "labels"))
        plan = self._plan(num_chunks, train)
        for chunk in self._chunks.values():
            chunk.loss_fn, chunk.returns_outputs, chunk.returned = criterion, return_outputs, {}
        self._edges.reset_shapes()
        DeepSeekStore.clear()
        try:
            result = self._executor.run(plan, feed)
            while DeepSeekStore.funcs_queue:  # what an `overlapped_forward_backward` has left to the pipeline
                DeepSeekStore.pop()
            loss = torch.stack([result.losses[micro] for micro in leaving]) if criterion and leaving else None
            outputs = self._returned(leaving) if return_outputs and leaving else None
        finally:
            DeepSeekStore.clear()
            for chunk in self._chunks.values():
                chunk.loss_fn, chunk.returned = None, {}
        return loss, outputs

    def _ends(self, stage: int, num_micro: int) -> list[int]:
        """The micro-batches that pass `stage` on this rank."""
        return [micro for micro in range(num_micro) if self._placement.rank_of(stage, micro) == self.rank]

    def _plan(self, num_micro: int, train: bool) -> Plan:
        if (num_micro, train) not in self._plans:
            self._plans[num_micro, train] = _lowered(self._schedule, self._placement, num_micro, train)
        return self._plans[num_micro, train]

    def _returned(self, leaving: list[int]) -> Nest:
        outputs = [self._chunks[self._last].returned[micro] for micro in leaving]
        whole = tuple(
            None if each[0] is None else torch.cat(each, self.batch_dim) for each in zip(*outputs, strict=True)
        )
        return whole[0] if len(whole) == 1 else whole


class DualPipe(StagePair):
    """DualPipe: micro-batches enter at both ends of the pipeline (DeepSeek-V3 report, section 3.2.1).

    Rank r of PP runs stage r for direction 0, which enters at rank 0, and stage PP-1-r for direction 1, which enters at
    rank PP-1. Of `num_chunks` micro-batches direction 0 has the larger half. Rank 0 gives the inputs of direction 0 and
    the labels of direction 1, and gets the losses of direction 1; the last rank the other way round.

    Both copies of a stage collect gradients of their own, of their own micro-batches. Add them up before the optimizer
    step with `sum_mirrored_gradients`, or in a reduction of your own.

    Args:
        modules: stage r and stage PP-1-r.
        batch_dim: dimension along which micro-batches are cut.
        process_group: ranks of the pipeline, an even number; None: all. A transfer is given up after its timeout. On
            NCCL every rank of the world makes its pipeline at the same time, since all of them take part in making
            communicators.
        rank_mapping: `rank_mapping[rank in process_group]` is the rank in the pipeline; None: the same.
        defer_weight_gradients: see `StagePair`.

    Raises:
        PlanError: the number of ranks is odd.
        ConfigError: torch.distributed is not initialized, or `rank_mapping` is no permutation.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        *,
        defer_weight_gradients: bool = True,
    ) -> None:
        ranks, transport, group = _connect("dualpipe", modules, process_group, rank_mapping)
        self._ranks, self._pipeline_group = ranks, group
        self._timeout_s = _timeout_of(group, modules)
        super().__init__("dualpipe", modules, batch_dim, transport, len(ranks), defer_weight_gradients, self._timeout_s)
        self._twin_group: dist.ProcessGroup | None = None

    def _make_twin_group(self) -> dist.ProcessGroup:
        """This rank and the one that holds the same stages."""
        last = len(self._ranks) - 1
        pairs = [(rank, self._ranks[last - at]) for at, rank in enumerate(self._ranks[: len(self._ranks) // 2])]
        if matches_by_tag(self._pipeline_group):
            mine = next(pair for pair in pairs if dist.get_rank() in pair)
            timeout = timedelta(seconds=self._timeout_s)
            return dist.new_group(sorted(mine), timeout, use_local_synchronization=True)
        (group,) = open_pairs([pairs], self._timeout_s, "twins", _device_of(self.module))
        assert group is not None
        return group

    @torch.no_grad()
    def sum_mirrored_gradients(self) -> None:
        """Give both copies of every stage the sum of their gradients, bit for bit the same. All ranks call it.

        A parameter that one copy has no gradient for counts as zero there.
        """
        if self._twin_group is None:
            self._twin_group = self._make_twin_group()
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for _, chunk in sorted(self._chunks.items()):
            for param in chunk.module.parameters():  # type: ignore[attr-defined]
                if param.requires_grad:
                    if param.grad is None:
                        param.grad = torch.zeros_like(param)
                    by_dtype.setdefault(param.grad.dtype, []).append(param.grad)
        for grads in by_dtype.values():
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=self._twin_group)
            for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view_as(grad))


class DualPipeV(StagePair):
    """DualPipeV: DualPipe cut in half, one copy of the parameters.

    Rank r of PP runs stages r and 2*PP-1-r. Rank 0 gives all inputs and labels, and gets all losses and outputs.

    Args:
        modules: stage r and stage 2*PP-1-r.
        batch_dim: dimension along which micro-batches are cut.
        process_group: ranks of the pipeline; None: all. A transfer is given up after its timeout. On NCCL every rank of
            the world makes its pipeline at the same time, since all of them take part in making communicators.
        rank_mapping: `rank_mapping[rank in process_group]` is the rank in the pipeline; None: the same.
        defer_weight_gradients: see `StagePair`.

    Raises:
        ConfigError: torch.distributed is not initialized, or `rank_mapping` is no permutation.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        batch_dim: int = 0,
        process_group: dist.ProcessGroup | None = None,
        rank_mapping: Sequence[int] | None = None,
        *,
        defer_weight_gradients: bool = True,
    ) -> None:
        ranks, transport, group = _connect("dualpipev", modules, process_group, rank_mapping)
        timeout_s = _timeout_of(group, modules)
        super().__init__("dualpipev", modules, batch_dim, transport, len(ranks), defer_weight_gradients, timeout_s)


class _Feed:
    """The micro-batches of one step on one rank: micro-batch -> tuple of tensors."""

    def __init__(self, inputs: dict[int, tuple[Nest, ...]], labels: dict[int, tuple[Nest, ...]]) -> None:
        self._inputs, self._labels = inputs, labels

    def inputs(self, micro: int) -> Nest:
        return self._inputs.pop(micro)

    def labels(self, micro: int) -> Nest:
        return self._labels.pop(micro)


def _cut(
    tensors: torch.Tensor | Sequence[torch.Tensor | None], micros: list[int], dim: int, what: str
) -> dict[int, tuple[Nest, ...]]:
    """Cut each of `tensors` along `dim` into one part for each of `micros`."""
    if not micros:
        return {}
    parts: list[Sequence[torch.Tensor | None]] = []
    given = tensors if isinstance(tensors, list | tuple) else (tensors,)
    for tensor in given:
        if tensor is None:
            parts.append([None] * len(micros))
        elif not isinstance(tensor, torch.Tensor) or not -tensor.ndim <= dim < tensor.ndim:
            kind = f"a tensor {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ConfigError(
                f"{what} must be tensors (or None) with a dimension {dim}, along which micro-batches are cut, "
                f"got {kind}"
            )
        elif tensor.shape[dim] % len(micros) or not tensor.shape[dim]:
            raise ConfigError(
                f"{what} of size {tensor.shape[dim]} along dimension {dim} cannot be cut into the {len(micros)} equal "
                "micro-batches of this rank: change num_chunks or the batch"
            )
        else:
            parts.append(tensor.tensor_split(len(micros), dim))
    for part in parts:
        for tensor in part:
            if tensor is not None and tensor.requires_grad and not tensor.is_leaf:
                tensor.retain_grad()  # the chunk reads `grad` of what enters a stage
    rows = zip(*parts, strict=True) if parts else [()] * len(micros)
    return dict(zip(micros, rows, strict=True))


def _lowered(schedule: str, placement: Placement, num_micro: int, train: bool) -> Plan:
    """The plan that the executor runs: the reference order, on which all ranks agree without a word."""
    if not train:
        return lower(forward_only(placement, num_micro), train=False)
    plan = lower(make_plan(schedule, placement.num_ranks, num_micro))
    verify(plan)
    return plan


def _device_of(modules: Iterable[nn.Module]) -> torch.device:
    return next((param.device for module in modules for param in module.parameters()), torch.get_default_device())


def _connect(
    schedule: str, modules: Sequence[nn.Module], group: dist.ProcessGroup | None, mapping: Sequence[int] | None
) -> tuple[list[int], PipelineTransport, dist.ProcessGroup]:
    """Global ranks of the pipeline in its own order, this rank's transport, and the process group."""
    if not dist.is_initialized():
        raise ConfigError("a pipeline needs its ranks: call torch.distributed.init_process_group first")
    group = group or dist.group.WORLD
    assert group is not None
    size = dist.get_world_size(group)
    edges = placement_of(schedule, size).edges()
    mapping = list(range(size)) if mapping is None else list(mapping)
    if sorted(mapping) != list(range(size)):
        raise ConfigError(f"rank_mapping must hold each of 0..{size - 1} once, got {mapping}")
    ranks = [dist.get_global_rank(group, mapping.index(position)) for position in range(size)]
    transport = transport_of(group)(
        ranks,
        mapping[dist.get_rank(group)],
        group,
        _device_of(modules),
        edges=edges,
        timeout_s=_timeout_of(group, modules),
    )
    return ranks, transport, group


def _timeout_of(group: dist.ProcessGroup, modules: Sequence[nn.Module]) -> float:
    """Seconds after which the maker of a process group wants its operations given up."""
    try:
        return group._get_backend(_device_of(modules)).options._timeout.total_seconds()
    except (AttributeError, RuntimeError):  # a backend that does not say
        return TIMEOUT_S
