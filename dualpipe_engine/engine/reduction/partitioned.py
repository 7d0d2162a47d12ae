"""Reductions of ZeRO-1 and ZeRO-2: gradients go to the rank that steps them, and nowhere else.

DeepSpeed's optimizer keeps its partitions, its norm, its overflow check and its step; only its reduction is replaced,
because its hooks would reduce whenever autograd accumulates, which in a pipeline is the wrong time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import Tensor, nn

from ..context import Context
from ..given import Optimizer
from .freezing import TrainedParams
from .interface import StageParams
from .norm import norm_of
from .order import contributions, reduction_order
from .side_stream import SideStream


@dataclass
class Piece:
    """Parts of gradients that one rank steps.

    Args:
        group: DeepSpeed's parameter group.
        owner: rank within the group's data-parallel group.
        parts: (parameter, its first element, elements, offset in the owner's partition).
    """

    group: int
    owner: int
    parts: list[tuple[nn.Parameter, int, int, int]] = field(default_factory=list)
    numel: int = 0


class PartitionedReduction:
    """Reduces into this rank's fp32 gradient partition.

    ZeRO-1 adds up a stage's gradients over the batch and reduces them once, after its last W. ZeRO-2 (`each`) reduces
    what every B and W adds and drops it, so that no full-size gradient of a stage lives from one of them to the next.
    Twins are at the same position of the schedule, so neither waits long for the other; `reduction_order` says in which
    order both issue. ZeRO-2 moves as many times the gradient as a copy of a stage runs micro-batches, M/2 in the
    bidirectional placement. It pays where the gradients saved, 4 bytes a parameter less the partition, are needed for
    larger layers or micro-batches, and where one reduction fits under one B: within a machine, or few parameters for
    the tokens of a micro-batch. With one copy of each stage there is nothing to partition and nothing to win.

    Weights tied across ranks are added up over the batch in both, and reduced at the step.

    Args:
        context: of the engine; its optimizer is a DeepSpeedZeroOptimizer.
        trained: which parameters are.
    """

    def __init__(self, context: Context, trained: TrainedParams) -> None:
        self._context = context
        self._optimizer = context.optimizer
        self._each = context.partitions_gradients
        self._params = StageParams(context, trained)
        self._side_stream = SideStream(context.device, context.observer)
        self._partitions: dict[int, Tensor] = {}
        for hook in self._optimizer._grad_acc_hooks:
            hook.remove()
        self._optimizer._grad_acc_hooks.clear()
        self._places = _places(self._optimizer)
        self._groups = [
            (group, dist.get_rank(group), dist.get_world_size(group)) for group in self._optimizer.real_dp_process_group
        ]
        late = self._params.late
        stages = self._params.of_stage if self._each else self._params.closed_by
        self._late = set(late)
        self._pieces = {stage: self._cut([p for p in held if p not in self._late]) for stage, held in stages.items()}
        self._late_pieces = self._cut(late)

    # -- the batch -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        self._side_stream.clear()
        self._partitions.clear()
        if self._each:
            plan, rank = self._context.plan, self._context.place.rank
            self._queue = deque(reduction_order(plan, rank))
            stages = contributions(plan, rank)
            self._expected = {stage: stages.count(stage) for stage in self._params.of_stage}
            self._seen = dict.fromkeys(self._expected, 0)

    def accumulate(self, stage: int) -> None:
        separate = self._optimizer.use_separate_grad_accum
        for param in self._params.of_stage[stage]:
            if separate and (not self._each or param in self._late):
                self._optimizer._fill_param_grad_accum_attribute(param)
        if self._each:
            self._seen[stage] += 1
            self._advance()
        self._side_stream.poll()

    def reduce(self, stage: int) -> None:
        if self._each:
            self._advance()
        else:
            self._start(self._pieces[stage])
        self._side_stream.poll()

    def finish(self) -> None:
        if self._each:
            self._advance()
            assert not self._queue, f"reductions {list(self._queue)} have not been issued"
        for param, group in self._params.tied:
            if param in self._places:
                dist.all_reduce(self._sum(param), group=group)
        self._start(self._late_pieces)
        self._side_stream.drain()
        for index in range(len(self._optimizer.bit16_groups)):
            self.hand_over(index)
        self._partitions.clear()

    def held(self) -> list[Tensor]:
        return list(self._partitions.values())

    def buffers(self) -> list[Tensor]:
        return [*self._side_stream.buffers, *self._partitions.values()]

    def _advance(self) -> None:
        """Issue all reductions whose turn has come; past its last B or W a rank adds nothing, but takes part."""
        while self._queue:
            stage, k = self._queue[0]
            if self._seen[stage] <= min(k, self._expected[stage] - 1):
                return
            self._queue.popleft()
            self._start(self._pieces[stage])

    # -- gradients to partitions ---------------------------------------------------------------------------------

    def _sum(self, param: nn.Parameter) -> Tensor:
        """What the batch has added up of a gradient, zeros where this rank ran no backward."""
        name = "grad_accum" if self._optimizer.use_separate_grad_accum else "grad"
        if getattr(param, name) is None:
            dtype = self._optimizer.gradient_accumulation_dtype if name == "grad_accum" else param.dtype
            setattr(param, name, torch.zeros_like(param, dtype=dtype))
        total: Tensor = getattr(param, name)
        return total

    def _take(self, param: nn.Parameter) -> Tensor | None:
        grad: Tensor | None = param.grad if param.grad_accum is None else param.grad_accum  # type: ignore[attr-defined]
        param.grad = param.grad_accum = None  # type: ignore[attr-defined]
        return grad

    def _start(self, pieces: list[Piece]) -> None:
        """Reduce gradients, and give up each as soon as it is copied."""
        rest: dict[nn.Parameter, tuple[Tensor | None, int]] = {}
        for piece in pieces:
            parts: list[Tensor | int] = []
            for param, start, length, _ in piece.parts:
                grad, left = rest.pop(param) if param in rest else (self._take(param), param.numel())
                parts.append(length if grad is None else grad.reshape(-1)[start : start + length])
                if left > length:
                    rest[param] = (grad, left - length)
            self._start_piece(piece, parts)

    def _start_piece(self, piece: Piece, parts: list[Tensor | int]) -> None:
        optimizer = self._optimizer
        group, rank, copies = self._groups[piece.group]
        divisor = dist.get_world_size(optimizer.dp_process_group) if optimizer.gradient_average else 1
        with self._side_stream.behind([part for part in parts if isinstance(part, Tensor)]):
            buffer = torch.zeros(piece.numel, dtype=self._dtype(piece), device=self._context.device)
            for part, hole in zip(parts, buffer.split([each[2] for each in piece.parts]), strict=True):
                if isinstance(part, Tensor):
                    hole.copy_(part)
            if divisor > 1:
                buffer.div_(divisor)
            work = None
            if copies > 1:
                owner = dist.get_global_rank(group, piece.owner)
                work = dist.reduce(buffer, owner, group=group, async_op=True)
        owns = rank == piece.owner
        self._side_stream.post(work, buffer, lambda: self._add(piece, buffer) if owns else None)

    def _dtype(self, piece: Piece) -> torch.dtype:
        """The configuration's communication dtype; what nobody else sees keeps its precision."""
        if self._groups[piece.group][2] == 1:
            return torch.float32
        dtype: torch.dtype = self._optimizer.get_param_comm_dtype(piece.parts[0][0])
        return dtype

    def _add(self, piece: Piece, buffer: Tensor) -> None:
        partition = self._partition(piece.group)
        position = 0
        for _, _, length, offset in piece.parts:
            partition[offset : offset + length].add_(buffer[position : position + length])
            position += length

    def _partition(self, index: int) -> Tensor:
        if index not in self._partitions:
            master = self._optimizer.single_partition_of_fp32_groups[index]
            self._partitions[index] = torch.zeros_like(master, device=self._context.device, requires_grad=False)
        return self._partitions[index]

    def hand_over(self, index: int) -> None:
        """Give the optimizer its partition, cut into views of single parameters, of which it takes the norm."""
        optimizer, flat = self._optimizer, self._partition(index)
        views, position = [], 0
        for param in optimizer.params_in_partition[index]:
            for _, _, length, offset in self._owned(param):
                if offset > position:
                    views.append(_padding(flat[position:offset]))
                views.append(flat[offset : offset + length])
                position = offset + length
                if optimizer.cpu_offload:
                    self._note_for_offload(param, views[-1])
        if position < flat.numel():
            views.append(_padding(flat[position:]))
        if optimizer.cpu_offload:
            optimizer.single_partition_of_fp32_groups[index].grad.copy_(flat)
        optimizer.averaged_gradients[index] = GradPartitionBufferGroup(views, flat)

    def _note_for_offload(self, param: nn.Parameter, grad: Tensor) -> None:
        optimizer = self._optimizer
        optimizer.norm_for_param_grads[optimizer.get_param_id(param)] = norm_of(grad)
        optimizer.update_offload_overflow_tracker(grad)

    # -- the layout ----------------------------------------------------------------------------------------------

    def _owned(self, param: nn.Parameter) -> list[tuple[int, int, int, int]]:
        rank = self._groups[self._places[param][0]][1]
        return [part for part in self._split(param) if part[0] == rank]

    def _split(self, param: nn.Parameter) -> list[tuple[int, int, int, int]]:
        """(owner, first element, elements, offset in the owner's partition) of each part of a parameter."""
        _, offset, size = self._places[param]
        parts, start = [], 0
        while start < param.numel():
            owner, inside = divmod(offset + start, size)
            length = min(param.numel() - start, size - inside)
            parts.append((owner, start, length, inside))
            start += length
        return parts

    def _cut(self, params: list[nn.Parameter]) -> list[Piece]:
        """Parameters as pieces of one owner each, of about `reduce_bucket_size` elements."""
        pieces: list[Piece] = []
        ordered = sorted(
            (param for param in params if param in self._places), key=lambda param: self._places[param][:2]
        )
        for param in ordered:
            index = self._places[param][0]
            for owner, start, length, offset in self._split(param):
                last = pieces[-1] if pieces else None
                full = last is not None and last.numel + length > self._optimizer.reduce_bucket_size
                if last is None or full or (last.group, last.owner) != (index, owner):
                    last = Piece(index, owner)
                    pieces.append(last)
                last.parts.append((param, start, length, offset))
                last.numel += length
        return pieces


def _places(optimizer: Optimizer) -> dict[nn.Parameter, tuple[int, int, int]]:
    """Parameter -> (group, offset in the group's flat weights, partition size)."""
    places = {}
    for index, members in enumerate(optimizer.round_robin_bit16_groups):
        size = int(optimizer.partition_size[index])
        for param, offset in zip(members, optimizer.round_robin_bit16_offsets[index], strict=True):
            places[param] = (index, offset, size)
    return places


def _padding(view: Tensor) -> Tensor:
    view._zero_padding = True  # type: ignore[attr-defined]
    return view
