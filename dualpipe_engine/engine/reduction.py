"""Reductions of gradients over the copies of a stage: what to reduce with whom, and the one of ZeRO-0.

A stage's gradients are complete on a rank after its last W, and their reduction starts there, beside the rest of the
schedule (`Lane`). Weights that are tied across ranks wait for the step, because their copies are added up first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import Tensor, nn

from ..schedule.op import REDUCE
from .lane import Lane

BUCKET = 1 << 25  #: elements of one collective: enough for full bandwidth, little beside a stage


class Reduction(Protocol):
    """What a `GradientTail` does with gradients before the optimizer steps."""

    def begin(self) -> None:
        """Start of a batch."""

    def accumulate(self, stage: int) -> None:
        """A B or W of `stage` has added to `param.grad`."""

    def reduce(self, stage: int) -> None:
        """The last B or W of `stage` on this rank has run."""

    def finish(self) -> None:
        """All gradients are where the optimizer's step looks for them, reduced."""

    def buffers(self) -> list[Tensor]:
        """Gradients that are held elsewhere than in the parameters' own attributes."""

    def held(self) -> list[Tensor]:
        """Of these the ones that stay until the step."""


class StageParams:
    """The parameters of a rank that reductions expect (`TrainedParams.reduced`), by when their gradients are complete.

    Attributes:
        all: in the order of the module, which is that of the twin.
        of_stage: stage -> its parameters; one that two stages of the rank share is listed with both.
        closed_by: stage -> parameters that are complete after the REDUCE of the stage.
        late: those that only the step may reduce: tied across ranks, or in no stage.
        tied: (parameter, process group) of the former.
    """

    def __init__(self, engine: Any) -> None:
        self.all = params = engine._trained.reduced
        trained = set(params)
        pairs: list[tuple[nn.Parameter, Any]] = engine.module.get_tied_weights_and_groups()
        self.tied = [(param, group) for param, group in pairs if dist.get_world_size(group) > 1 and param in trained]
        tied = {param for param, _ in self.tied}
        held = {stage: params_of(view.forward_funcs) for stage, view in engine._views.items()}
        order = [op.stage for op in engine.plan.programs[engine.place.rank] if op.kind == REDUCE]
        closing = {param: stage for stage in order for param in held[stage] if param not in tied}
        self.of_stage = {stage: [p for p in params if p in held[stage]] for stage in held}
        self.closed_by = {stage: [p for p in params if closing.get(p) == stage] for stage in held}
        self.late = [param for param in params if param not in closing]


def params_of(functions: Iterable[Any]) -> set[nn.Parameter]:
    """Parameters of layers: modules, functions bound to one (a TiedLayerSpec's `forward_fn`), methods of one."""
    found: set[nn.Parameter] = set()
    for function in functions:
        parts = [function, getattr(function, "__self__", None)]
        if isinstance(function, partial):
            parts += [*function.args, *function.keywords.values(), function.func]
        for part in parts:
            if isinstance(part, nn.Module):
                found.update(part.parameters())
    return found


class AllReduce:
    """Every copy gets the whole mean: ZeRO-0, and DeepSpeed's BF16_Optimizer, which keeps fp32 sums of its own.

    Args:
        engine: the DualPipeEngine.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._params = StageParams(engine)
        self._lane = Lane(engine.device, engine._observer)
        self._sums: dict[nn.Parameter, Tensor] = {}
        if engine.using_bf16_optimizer:
            optimizer = engine.optimizer
            for held, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
                self._sums.update(zip(held, sums, strict=True))

    def begin(self) -> None:
        self._lane.clear()

    def accumulate(self, stage: int) -> None:
        if self._sums:
            self._engine.optimizer.update_hp_grads(clear_lp_grads=False)
            self._engine.optimizer.clear_lp_grads(set_to_none=True)
        self._lane.poll()

    def reduce(self, stage: int) -> None:
        self._start(self._params.closed_by[stage])

    def finish(self) -> None:
        for param, group in self._params.tied:
            dist.all_reduce(self._take(param, keep=True), group=group)
        self._start(self._params.late)
        self._lane.drain()
        if self._sums:
            # The norm counts what has had a gradient; here a twin's will do.
            optimizer = self._engine.optimizer
            optimizer.fp32_groups_has_gradients = [[True] * len(held) for held in optimizer.bf16_groups]

    def catch_up(self) -> None:
        """After `finish`: reduce what has been unfrozen since this was made, and drop what has been frozen."""
        known, now = set(self._params.all), StageParams(self._engine)
        for param in known.difference(now.all):
            param.grad = None
        for param, group in now.tied:
            if param not in known:
                dist.all_reduce(self._take(param, keep=True), group=group)
        self._start([param for param in now.all if param not in known])
        self._lane.drain()

    def buffers(self) -> list[Tensor]:
        return self._lane.buffers

    def held(self) -> list[Tensor]:
        return [] if self._sums else self._lane.buffers  # what they hold goes back to the parameters

    def _take(self, param: nn.Parameter, keep: bool = False) -> Tensor:
        """The local gradient, zeros where this rank ran no backward; unless `keep`, `param.grad` is given up."""
        if param in self._sums:
            return self._sums[param]
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        grad = param.grad
        if not keep:
            param.grad = None
        return grad

    def _put(self, param: nn.Parameter, mean: Tensor) -> None:
        if param in self._sums:
            self._sums[param].copy_(mean.view_as(self._sums[param]))
        else:
            param.grad = mean.to(param.dtype)

    def _start(self, params: list[nn.Parameter]) -> None:
        kinds: dict[tuple[Any, torch.dtype], list[nn.Parameter]] = {}
        for param in params:
            kinds.setdefault((_group_of(self._engine, param), param.dtype), []).append(param)
        for (group, _), members in kinds.items():
            for bucket in buckets(members):
                self._start_bucket(group, bucket)
        self._lane.poll()

    def _start_bucket(self, group: Any, params: list[nn.Parameter]) -> None:
        engine = self._engine
        before, after = _factors(engine)
        grads = [self._take(param) for param in params]
        with self._lane.behind(grads):
            dtype = engine.communication_data_type if grads[0].dtype.itemsize <= 4 else grads[0].dtype
            buffer = _flat(grads, dtype)
            if before != 1.0:
                buffer.mul_(before)
            work = dist.all_reduce(buffer, group=group, async_op=True)

        def done() -> None:
            if after != 1.0:
                buffer.mul_(after)
            for param, part in zip(params, buffer.split([param.numel() for param in params]), strict=True):
                self._put(param, part.view_as(param))

        self._lane.post(work, buffer, done)


def buckets(params: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters, in order, in runs of at most `BUCKET` elements; a larger one alone."""
    held: list[nn.Parameter] = []
    numel = 0
    for param in params:
        if held and numel + param.numel() > BUCKET:
            yield held
            held, numel = [], 0
        held.append(param)
        numel += param.numel()
    if held:
        yield held


def _flat(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All gradients in one tensor, each given up as soon as it is copied; a single one is not copied."""
    if len(grads) == 1 and grads[0].dtype == dtype and grads[0].is_contiguous():
        return grads.pop().view(-1)
    buffer = torch.empty(sum(grad.numel() for grad in grads), dtype=dtype, device=grads[0].device)
    for hole in buffer.split([grad.numel() for grad in grads]):
        grad = grads.pop(0)
        hole.view_as(grad).copy_(grad)
    return buffer


def _group_of(engine: Any, param: Any) -> Any:
    """The ranks that hold copies of a parameter."""
    if is_moe_param(param):
        return groups._get_expert_data_parallel_group(param.group_name)
    return engine.mpu.get_data_parallel_group()


def _factors(engine: Any) -> tuple[float, float]:
    """Factors before and after the sum, as the DeepSpeed configuration asks for. Experts divide by all copies too."""
    copies = engine.mpu.get_data_parallel_world_size()
    if not engine.gradient_average:
        return 1.0, 1.0
    if not engine.postscale_gradients():
        return 1.0 / copies, 1.0
    ahead = engine.gradient_predivide_factor()
    return 1.0 / ahead, ahead / copies
