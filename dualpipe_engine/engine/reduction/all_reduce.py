"""AllReduce: every copy of a stage gets the whole mean, as without ZeRO."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..context import Context
from .freezing import TrainedParams
from .interface import StageParams
from .side_stream import SideStream

BUCKET = 1 << 25  #: elements of one collective: enough for full bandwidth, little beside a stage


class AllReduce:
    """Every copy gets the whole mean: ZeRO-0, and DeepSpeed's BF16_Optimizer, which keeps fp32 sums of its own.

    Args:
        context: of the engine.
        trained: which parameters are.
    """

    def __init__(self, context: Context, trained: TrainedParams) -> None:
        self._context, self._trained = context, trained
        self._params = StageParams(context, trained)
        self._side_stream = SideStream(context.device, context.observer)
        self._sums: dict[nn.Parameter, Tensor] = {}
        optimizer = context.optimizer
        if context.sums_in_fp32 and optimizer.using_real_optimizer:  # not in an engine that only evaluates
            for hook in optimizer._grad_acc_hooks:  # of "immediate_grad_update", which `accumulate` does, too
                hook.remove()
            optimizer._grad_acc_hooks.clear()
            for params, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
                self._sums.update(zip(params, sums, strict=True))

    def begin(self) -> None:
        self._side_stream.clear()

    def accumulate(self, stage: int) -> None:
        # What `update_hp_grads` does, in one pass over a gradient: it makes an fp32 copy first.
        for param, total in self._sums.items():
            if param.grad is not None:
                total.add_(param.grad.view_as(total))
                param._hp_grad = total  # type: ignore[attr-defined]  # where DeepSpeed looks for a tied weight's
                param.grad = None
        self._side_stream.poll()

    def reduce(self, stage: int) -> None:
        self._start(self._params.closed_by[stage])

    def finish(self) -> None:
        for param, group in self._params.tied:
            dist.all_reduce(self._take(param, keep=True), group=group)
        self._start(self._params.late)
        self._side_stream.drain()
        if self._sums:
            # The norm counts what has had a gradient; here a twin's will do.
            optimizer = self._context.optimizer
            optimizer.fp32_groups_has_gradients = [[True] * len(params) for params in optimizer.bf16_groups]

    def catch_up(self) -> None:
        """After `finish`: reduce what has been unfrozen since this was made, and drop what has been frozen."""
        known, now = set(self._params.all), StageParams(self._context, self._trained)
        for param in known.difference(now.all):
            param.grad = None
        for param, group in now.tied:
            if param not in known:
                dist.all_reduce(self._take(param, keep=True), group=group)
        self._start([param for param in now.all if param not in known])
        self._side_stream.drain()

    def buffers(self) -> list[Tensor]:
        return self._side_stream.buffers

    def held(self) -> list[Tensor]:
        return [] if self._sums else self._side_stream.buffers  # what they hold goes back to the parameters

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
        kinds: dict[tuple[ProcessGroup, torch.dtype], list[nn.Parameter]] = {}
        for param in params:
            kinds.setdefault((self._group_of(param), param.dtype), []).append(param)
        for (group, _), members in kinds.items():
            if dist.get_world_size(group) == 1:
                self._scale(members)
                continue
            for bucket in buckets(members):
                self._start_bucket(group, bucket)
        self._side_stream.poll()

    def _group_of(self, param: nn.Parameter) -> ProcessGroup:
        """The ranks that hold copies of a parameter."""
        if is_moe_param(param):
            return groups._get_expert_data_parallel_group(param.group_name)  # type: ignore[attr-defined]
        return self._context.groups.copies

    def _dtype(self, grad: Tensor) -> torch.dtype:
        """In which a gradient is reduced."""
        return self._context.scaling.dtype if grad.dtype.itemsize <= 4 else grad.dtype

    def _scale(self, params: list[nn.Parameter]) -> None:
        """Reduce what nobody else has a copy of, as experts where each rank has its own: in place, to the same bits."""
        factors = [factor for factor in (self._context.scaling.before, self._context.scaling.after) if factor != 1.0]
        for param in params:
            grad = self._take(param, keep=True)
            dtype = self._dtype(grad)
            if not factors and torch.promote_types(grad.dtype, dtype) == dtype:
                continue
            mean = grad.to(dtype)
            for factor in factors:
                mean.mul_(factor)
            if mean is not grad:
                self._put(param, mean)

    def _start_bucket(self, group: ProcessGroup, params: list[nn.Parameter]) -> None:
        scaling = self._context.scaling
        grads = [self._take(param) for param in params]
        with self._side_stream.behind(grads):
            buffer = _flat(grads, self._dtype(grads[0]))
            if scaling.before != 1.0:
                buffer.mul_(scaling.before)
            work = dist.all_reduce(buffer, group=group, async_op=True)

        def done() -> None:
            if scaling.after != 1.0:
                buffer.mul_(scaling.after)
            for param, part in zip(params, buffer.split([param.numel() for param in params]), strict=True):
                self._put(param, part.view_as(param))

        self._side_stream.post(work, buffer, done)


def buckets(params: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters, in order, in runs of at most `BUCKET` elements; a larger one alone."""
    bucket: list[nn.Parameter] = []
    numel = 0
    for param in params:
        if bucket and numel + param.numel() > BUCKET:
            yield bucket
            bucket, numel = [], 0
        bucket.append(param)
        numel += param.numel()
    if bucket:
        yield bucket


def _flat(grads: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All gradients in one tensor, each given up as soon as it is copied; a single one is not copied."""
    if len(grads) == 1 and grads[0].dtype == dtype and grads[0].is_contiguous():
        return grads.pop().view(-1)
    buffer = torch.empty(sum(grad.numel() for grad in grads), dtype=dtype, device=grads[0].device)
    for hole in buffer.split([grad.numel() for grad in grads]):
        grad = grads.pop(0)
        hole.view_as(grad).copy_(grad)
    return buffer
