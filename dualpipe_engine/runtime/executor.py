"""Executor: interprets one rank's program of a lowered plan. It knows ops, and no schedule by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch.utils import _pytree as pytree

from ..comm.nest import Nest, as_it_is
from ..comm.p2p import Edges
from ..errors import DualPipeError
from ..schedule.op import FB, OFFLOAD, RECV_B, RECV_F, REDUCE, RELOAD, SEND_B, SEND_F, SENDS, STEP, B, F, I, Op, W
from ..schedule.plan import Plan
from ..schedule.progress import blame_transfer, waiting
from ..schedule.records import DATA, FLUSH, RECEIVE, SEND
from .borders import Borders
from .chunk import StageChunk
from .drain import BatchFailed, Drain, Failing
from .observer import Observer
from .offload import Offload
from .run_state import BatchResult, Feed, RunState


class Tail(Protocol):
    """What happens around the gradients; the engine's side of the program."""

    def accumulate(self, stage: int) -> None:
        """Called after every B and W of `stage`."""

    def reduce(self, stage: int) -> None:
        """The last gradient of `stage` on this rank is there: start its reduction."""

    def step(self, losses: Mapping[int, torch.Tensor]) -> None:
        """Finish all reductions and step the optimizer; `losses` are those of the micro-batches that end here."""


class Executor:
    """Runs programs of one rank.

    Args:
        rank: position in the pipeline.
        chunks: stage number -> the chunk of that stage on this rank.
        edges: transfers to the neighbours.
        observer: times every op.
        tail: gradient accumulation, reduction and optimizer step; None when there is nothing to do.
        on_micro: called with (stage, micro) before every forward, for per-micro-batch state such as seeds.
        borders: notes NaN and inf in what passes the borders of stages.
        failing: knows of batches that fail on one rank; None: an error ends the job.
        offload: takes activations to host memory where a plan says so; None: no plan does.

    Attributes:
        chunks: as given; others may take their place between batches.
        on_micro: likewise.
        scale: factor on every loss before its backward.
    """

    def __init__(
        self,
        rank: int,
        chunks: Mapping[int, StageChunk],
        edges: Edges,
        observer: Observer,
        tail: Tail | None = None,
        on_micro: Callable[[int, int], None] | None = None,
        borders: Borders | None = None,
        failing: Failing | None = None,
        offload: Offload | None = None,
    ) -> None:
        self._rank = rank
        self.chunks = chunks
        self._edges = edges
        self._observer = observer
        self._tail = tail
        self.on_micro = on_micro
        self._borders = borders
        self._failing = failing
        self._offload = offload
        self._failures: Mapping[int, object] = {} if failing is None else failing.failures
        self.scale = 1.0
        self._handlers: dict[str, Callable[[Op], None]] = {
            F: self._forward,
            B: self._backward,
            I: self._backward,
            W: self._weight,
            FB: self._pair,
            SEND_F: self._send_forward,
            SEND_B: self._send_backward,
            RECV_F: self._recv_forward,
            RECV_B: self._recv_backward,
            OFFLOAD: self._let_go,
            RELOAD: self._bring_back,
            REDUCE: self._reduce,
            STEP: self._step,
        }

    def run(self, plan: Plan, feed: Feed, *, train: bool = True) -> BatchResult:
        """Execute this rank's program of `plan`.

        Raises:
            PipelineRuntimeError: a transfer failed; what a layer, the loss or the feed raises passes through.

        Where batches may fail, such an error is raised by the tail's `step`, on all ranks; inference returns, and
        leaves that to the caller.
        """
        self._state = state = RunState(plan.placement, feed, train)
        drain: Drain | None = None
        self._observer.start_batch()
        if self._borders is not None:
            self._borders.clear()
        program = plan.programs[self._rank]
        if self._offload is not None:
            self._offload.begin_batch(program)
        position = self._edges.position
        position.plan, position.awaits, position.device_done = plan, None, self._observer.device_done
        try:
            for op, following in zip(program, (*program[1:], None), strict=True):
                position.op, state.following = op, following
                try:
                    if drain is not None:
                        drain.run(op)
                        continue
                    if self._failures:
                        self._stop_if_failed()
                    if state.behind and op.kind not in SENDS:
                        self._catch_up()
                    self._handlers[op.kind](op)
                except Exception as error:
                    if drain is not None or state.in_tail:
                        raise
                    drain = self._give_up(op, error)
                    drain.run(op)
            with self._observer.waiting(FLUSH), waiting():
                self._edges.flush()
            position.op = None
            if drain is not None:
                self._clear()
                self._edges.reset_shapes()
        except BaseException as error:
            self._clear()
            if position.awaits is not None:
                blame_transfer(error)
            if getattr(error, "everywhere", False):
                self._edges.flush()
                self._edges.reset_shapes()
            elif isinstance(error, DualPipeError):
                raise self._placed(op, error) from error
            raise
        finally:
            del self._state
        return state.result

    def _clear(self) -> None:
        for chunk in self.chunks.values():
            chunk.clear()
        if self._offload is not None:
            self._offload.clear()
        self._state.clear()

    def _placed(self, op: Op, error: DualPipeError) -> DualPipeError:
        return type(error)(f"pipeline rank {self._rank}, op {op}: {error}")

    def _stop_if_failed(self) -> None:
        """Raises:
        BatchFailed: what has come from another rank is no result.
        """
        if self._failing is not None and self._failing.batch_failed:
            raise BatchFailed

    def _give_up(self, op: Op, error: Exception) -> Drain:
        """What does the rest of the program, when all ranks know that the batch has failed.

        Raises:
            Exception: `error`, if they cannot.
        """
        if self._failing is None:
            raise error
        where = f"pipeline rank {self._rank}, op {op}"
        if isinstance(error, BatchFailed):
            self._failing.fail_batch(None)
        else:
            self._failing.fail_batch(error, where)
        self._clear()
        return Drain(self._rank, self._edges, self._handlers, self._state, self._accumulate_nothing)

    def _accumulate_nothing(self, stage: int) -> None:
        if self._tail is not None:
            self._tail.accumulate(stage)

    def _take_inputs(self, op: Op) -> Nest:
        """What the stage of a forward takes: in training, what its chunk has made of it."""
        stage, micro = op.stage, op.micro
        enter = self.chunks[stage].enter if self._state.train else as_it_is
        if stage == 0:
            start = self._observer.now()
            inputs = self._state.feed.inputs(micro)
            self._observer.waited(DATA, op, start)
            if self._borders is not None:
                self._borders.data(micro, inputs)
            return enter(inputs)
        key, state = (stage, micro), self._state
        if key in state.inputs:
            return enter(state.inputs.pop(key))
        start = self._observer.now()
        inputs = self._edges.wait_forward(stage, micro, enter)
        self._observer.waited(RECEIVE, op, start)
        if self._failures:
            self._stop_if_failed()
        return inputs

    def _take_grads(self, op: Op) -> list[torch.Tensor] | None:
        stage, micro = op.stage, op.micro
        state = self._state
        if stage == state.last:
            return None
        key = (stage, micro)
        if key in state.grads:
            return state.grads.pop(key)
        start = self._observer.now()
        grads = self._edges.wait_backward(stage, micro)
        self._observer.waited(RECEIVE, op, start)
        if self._failures:
            self._stop_if_failed()
        return grads

    def _labels(self, op: Op) -> Nest:
        if op.stage != self._state.last:
            return None
        start = self._observer.now()
        labels = self._state.feed.labels(op.micro)
        self._observer.waited(DATA, op, start)
        return labels

    def _prepare(self, op: Op) -> tuple[Nest, Nest]:
        if self.on_micro is not None:
            self.on_micro(op.stage, op.micro)
        return self._take_inputs(op), self._labels(op)

    def passing(self) -> list[torch.Tensor]:
        """Tensors that are on their way from stage to stage, here or between ranks, and that no stage keeps."""
        state = self._state
        here = pytree.tree_leaves([list(each.values()) for each in (state.inputs, state.outputs, state.grads)])
        return [leaf for leaf in here if isinstance(leaf, torch.Tensor)] + self._edges.under_way()

    def _forward(self, op: Op) -> None:
        inputs, labels = self._prepare(op)
        chunk, train = self.chunks[op.stage], self._state.train
        with self._observer.span(op):
            output = chunk.forward(op.micro, inputs, labels) if train else chunk.infer(inputs)
            if self._offload is not None:
                self._offload.leave(op.stage, op.micro)
        self._pass_on(op, output, labels)
        if train:
            self._state.behind.append((chunk.release_outputs, (op.micro,)))

    def _pass_on(self, op: Op, output: Nest, labels: Nest) -> None:
        stage, micro, state = op.stage, op.micro, self._state
        if stage < state.last:
            if state.rank_of(stage + 1, micro) == self._rank:
                self._note_output(op, output)
                # A copy: the next stage may work in place on what this stage's backward still needs.
                alone = isinstance(output, torch.Tensor)  # the usual case, without the cost of a nest
                state.inputs[stage + 1, micro] = (
                    output.clone() if alone else pytree.tree_map_only(torch.Tensor, torch.clone, output)
                )
            else:
                state.outputs[stage, micro] = output
        elif state.train:
            if self._borders is not None:
                self._borders.loss(stage, micro, output)
            state.result.losses[micro] = output
        else:
            state.result.outputs[micro] = (output, labels)

    def _note_output(self, op: Op, output: Nest) -> None:
        if self._borders is not None:
            self._state.behind.append((self._borders.output, (op.stage, op.micro, output)))

    def _backward(self, op: Op) -> None:
        grads = self._take_grads(op)
        chunk = self.chunks[op.stage]
        with self._observer.span(op):
            if self._offload is not None:
                self._offload.await_back(op.stage, op.micro)
            if op.kind == B:
                back = chunk.backward(op.micro, grads, self.scale)
                self._accumulate(op)
            else:
                back = chunk.input_backward(op.micro, grads, self.scale)
                if self._borders is not None:  # those that are not deferred
                    self._borders.weights(op.stage, op.micro)
        self._pass_back(op, back)

    def _pass_back(self, op: Op, grads: list[torch.Tensor]) -> None:
        stage, micro, state = op.stage, op.micro, self._state
        local = stage > 0 and state.rank_of(stage - 1, micro) == self._rank
        if local or stage == 0:
            self._note_grads(op, grads)
        if stage > 0:
            # A gradient that stays here is keyed by its consumer, one that travels by its producer.
            state.grads[(stage - 1, micro) if local else (stage, micro)] = grads

    def _note_grads(self, op: Op, grads: list[torch.Tensor]) -> None:
        if self._borders is not None:
            self._state.behind.append((self._borders.back, (op.stage, op.micro, grads)))

    def _catch_up(self) -> None:
        """Do what the last op has left until its sends are under way, since a neighbour may wait for them."""
        behind = self._state.behind
        for do, arguments in behind:
            do(*arguments)
        behind.clear()

    def _weight(self, op: Op) -> None:
        with self._observer.span(op):
            self.chunks[op.stage].weight_backward(op.micro)
            self._accumulate(op)

    def _pair(self, op: Op) -> None:
        forward, backward = op.parts
        chunk, other = self.chunks[forward.stage], self.chunks[backward.stage]
        if backward.kind == B and chunk.pairs_with(other):
            inputs, labels = self._prepare(forward)
            grads = self._take_grads(backward)
            with self._observer.span(op):
                if self._offload is not None:
                    self._offload.await_back(backward.stage, backward.micro)
                output, back = chunk.overlapped(forward.micro, inputs, labels, other, backward.micro, grads, self.scale)
                if self._offload is not None:
                    self._offload.leave(forward.stage, forward.micro)
                self._accumulate(backward)
            self._pass_on(forward, output, labels)
            self._pass_back(backward, back)
            self._state.behind.append((chunk.release_outputs, (forward.micro,)))
            return
        self._forward(forward)
        # Nothing of the pair runs together, so the next stage need not wait for the backward half. A send that the plan
        # has moved stays where it is.
        key, following = (forward.stage, forward.micro), self._state.following
        if following is not None and following.kind == SEND_F and (following.stage, following.micro) == key:
            self._send_forward(following)
            self._state.sent.add(key)
        self._catch_up()
        self._backward(backward)

    def _send_forward(self, op: Op) -> None:
        if (output := self._state.outputs.pop((op.stage, op.micro), None)) is not None:
            start = self._observer.now()
            self._edges.send_forward(op.stage, op.micro, output, self._state.rank_of(op.stage + 1, op.micro))
            self._observer.waited(SEND, op, start)
            self._note_output(op, output)

    def _send_backward(self, op: Op) -> None:
        grads = self._state.grads.pop((op.stage, op.micro))
        start = self._observer.now()
        self._edges.send_backward(op.stage, op.micro, grads, self._state.rank_of(op.stage - 1, op.micro))
        self._observer.waited(SEND, op, start)
        self._note_grads(op, grads)

    def _recv_forward(self, op: Op) -> None:
        self._edges.post_forward(op.stage, op.micro, self._state.rank_of(op.stage - 1, op.micro))

    def _recv_backward(self, op: Op) -> None:
        self._edges.post_backward(op.stage, op.micro, self._state.rank_of(op.stage + 1, op.micro))

    def _let_go(self, op: Op) -> None:
        with self._observer.span(op):
            self._offloading().let_go(op.stage, op.micro)

    def _bring_back(self, op: Op) -> None:
        with self._observer.span(op):
            self._offloading().bring_back(op.stage, op.micro)

    def _offloading(self) -> Offload:
        assert self._offload is not None, "a plan with copies needs an Offload"
        return self._offload

    def _accumulate(self, op: Op) -> None:
        if self._borders is not None:
            self._borders.weights(op.stage, op.micro)
        if self._tail is not None:
            self._state.in_tail = True
            self._tail.accumulate(op.stage)
            self._state.in_tail = False

    def _reduce(self, op: Op) -> None:
        if self._tail is not None:
            self._state.in_tail = True
            with self._observer.span(op):
                self._tail.reduce(op.stage)
            self._state.in_tail = False

    def _step(self, op: Op) -> None:
        if self._tail is not None:
            self._state.in_tail = True
            with self._observer.span(op):
                self._tail.step(self._state.result.losses)
            self._state.in_tail = False
