"""What a schedule costs without an engine: the ops of its plan one after another, over gloo alone.

Stages, autograd and transfers are those of the other contestants, in the plan's order. There is no record, no check and
no optimizer. So what such a step takes beyond its simulation is the machine's, torch's and gloo's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from sleeping import OverlappingStage, Times, mean, stage_class

from dualpipe_engine.comm.gloo_threads import take_turns
from dualpipe_engine.schedule.op import COMPUTE, FB, SEND_F, SENDS, B, F, Op, W
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.plan import Plan

_Key = tuple[int, int]  #: stage, micro-batch


class _Store:
    """Weight gradients that wait for their W."""

    def __init__(self) -> None:
        self.deferring = False
        self.kept: list[Callable[[], None]] = []

    def put(self, weight_gradient: Callable[[], None]) -> None:
        self.kept.append(weight_gradient)


class Bare:
    """This rank's part of a pipeline.

    Args:
        plan: compute ops.
        times: of a stage.
        shape: of a micro-batch, [rows, width].
    """

    def __init__(self, plan: Plan, times: Times, shape: tuple[int, int]) -> None:
        self._group = dist.new_group()
        take_turns()
        self._placement, self._last, self._shape = plan.placement, plan.placement.num_stages - 1, shape
        self._program = lower(plan).programs[dist.get_rank()]
        self._stages = {stage: stage_class(times)(times) for stage in plan.placement.stages_of(dist.get_rank())}
        self._store = _Store()
        for module in self._stages.values():
            module.weight_grad_store = self._store
        self._data, self._labels = torch.ones(shape), torch.zeros(shape)
        self._coming: dict[Op, tuple[dist.Work, torch.Tensor]] = {}
        self._inputs: dict[_Key, torch.Tensor] = {}  # until their gradients have been passed on
        self._outputs: dict[_Key, torch.Tensor] = {}  # until their backward; of the last stage the losses
        self._weights: dict[_Key, list[Callable[[], None]]] = {}

    def step(self) -> None:
        """Run a batch."""
        going = []
        for module in self._stages.values():
            module.weight.grad = None
        for op in self._program:
            if op.kind in SENDS:
                tensor = self._outputs[_key(op)].detach() if op.kind == SEND_F else self._inputs.pop(_key(op)).grad
                assert tensor is not None
                going.append((self._group.send([tensor], *self._route(op, op)), tensor))
            elif op.kind in COMPUTE:
                self._run(op)
            elif op.micro >= 0:
                tensor = torch.empty(self._shape)
                self._coming[op] = self._group.recv([tensor], *self._route(op, op.other_end())), tensor
        for work, _ in going:
            work.wait()

    def _route(self, op: Op, send: Op) -> tuple[int, int]:
        """The rank at the other end of a transfer, and its tag."""
        tag = (send.micro * (self._last + 1) + send.stage) * 2 + send.is_forward
        return self._placement.rank_of(op.other_end().stage, op.micro), tag

    def _run(self, op: Op) -> None:
        if op.kind == FB:
            forward, backward = op.parts
            if backward.kind == B and issubclass(type(self._stages[op.stage]), OverlappingStage):
                self._pair(forward, backward)
            else:
                self._run(forward)
                self._run(backward)
        elif op.kind == F:
            output = self._stages[op.stage](self._take(op))
            self._outputs[_key(op)] = mean(output, self._labels) if op.stage == self._last else output
        elif op.kind == W:
            for weight_gradient in self._weights.pop(_key(op)):
                weight_gradient()
        else:
            self._store.deferring = op.kind != B
            self._outputs.pop(_key(op)).backward(self._gradient(op))
            if self._store.deferring:
                self._weights[_key(op)], self._store.kept = self._store.kept, []
                self._store.deferring = False

    def _pair(self, forward: Op, backward: Op) -> None:
        ends, begins = forward.stage == self._last, backward.stage == self._last
        output, loss = self._stages[forward.stage].overlapped_forward_backward(  # type: ignore[operator]
            self._stages[forward.stage],
            [self._take(forward)],
            mean if ends else None,
            [self._labels],
            self._stages[backward.stage],
            self._outputs.pop(_key(backward)) if begins else None,
            None if begins else [self._outputs.pop(_key(backward))],
            None if begins else [self._gradient(backward)],
        )
        self._outputs[_key(forward)] = loss if ends else output

    def _take(self, op: Op) -> torch.Tensor:
        """What a forward takes."""
        stage, micro = _key(op)
        if stage == 0:
            value = self._data
        elif (found := self._coming.pop(op.receive(), None)) is not None:
            found[0].wait()
            value = found[1]
        else:
            value = self._outputs[stage - 1, micro]
        self._inputs[stage, micro] = value.detach().requires_grad_()
        return self._inputs[stage, micro]

    def _gradient(self, op: Op) -> torch.Tensor | None:
        """What a backward takes."""
        stage, micro = _key(op)
        if stage == self._last:
            return None
        if (found := self._coming.pop(op.receive(), None)) is not None:
            found[0].wait()
            return found[1]
        return self._inputs.pop((stage + 1, micro)).grad


def _key(op: Op) -> _Key:
    return op.stage, op.micro
