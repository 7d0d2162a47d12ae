"""Overlap: a stage run phase by phase, so that a forward and a backward hide each other's communication.

Each phase is an autograd segment. Forward and backward of a micro-batch are coroutines that stop wherever they have
posted communication; `interleave` lets one compute while the other communicates, as in figure 4 of the DeepSeek-V3
report (arXiv 2412.19437), on one Python thread and in an order that depends on the phases alone, so that all ranks of
an expert-parallel group post their collectives in one order. Weight gradients fill what is left of a wait.

Between two phases the graph is cut, and nothing is kept of what passes the cut but what the phases save themselves: for
the backward a leaf without memory stands in its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..comm.nest import Nest, as_it_is
from ..comm.tickets import Tickets, Transfer
from ..errors import ConfigError
from .chunk import ChunkOptions, StageChunk, _inside, empty
from .filling import Filling, Weights
from .phases import COMM, COMPUTE, Phase, fault_of_communication, hooks_of, noting_calls, runs_by_phases

if TYPE_CHECKING:
    from typing_extensions import Unpack

First = TypeVar("First")
Result = TypeVar("Result")
#: Yields None before it posts, and then what it has posted; it must not be resumed before that is done.
Steps = Generator[Tickets | None, None, Result]
Grads = list[torch.Tensor | None]


def phases_of(
    layers: Sequence[Callable[..., Nest]],
    recompute: Callable[[Callable[..., Nest]], bool] = lambda layer: False,
) -> list[Phase]:
    """The phases of a stage: those of its layers, with computation that nothing separates merged into one.

    Args:
        layers: the layers, in order; one that does not run by phases is one computation.
        recompute: whether the computation of a layer is activation-checkpointed. What its communication delivers is
            kept, so nothing is sent twice.
    """
    found: list[Phase] = []
    for layer in layers:
        parts = layer.phases() if runs_by_phases(layer) else [Phase(type(layer).__name__, COMPUTE, layer)]
        again = recompute(layer)
        for part in _merged(parts):
            if again and part.kind == COMPUTE:
                part = part._replace(run=partial(checkpoint, part.run, use_reentrant=False))
            found.append(part)
    return _merged(found)


def _merged(phases: Sequence[Phase]) -> list[Phase]:
    """Phases with computation that nothing separates made one."""
    merged: list[Phase] = []
    for name, kind, run in phases:
        if kind == COMPUTE and merged and merged[-1].kind == COMPUTE:
            before = merged.pop()
            name, run = f"{before.name}+{name}", partial(_chain, before.run, run)
        merged.append(Phase(name, kind, run))
    return merged


def _chain(first: Callable[[Nest], Nest], second: Callable[[Nest], Nest], state: Nest) -> Nest:
    return second(first(state))


@dataclass
class _Segment:
    """One phase of one micro-batch, between its forward and its backward.

    Args:
        leaves: one for each tensor that it took and that needs a gradient; see `_cut`.
        edges: for each output that needs a gradient its edge, or the index of the leaf that went through.
        tickets: of its transfers.
    """

    leaves: list[torch.Tensor]
    edges: list[GradientEdge | int]
    tickets: Tickets

    @property
    def travels_back(self) -> bool:
        """Whether the backward of a communication phase posts anything."""
        return any(not isinstance(edge, int) for edge in self.edges)


class PhasedChunk(StageChunk):
    """A stage that runs by phases; see `StageChunk`.

    Args:
        module: the stage, for inference.
        stage: global stage number.
        phases: what `phases_of` makes of the stage.
        timeout_s: seconds after which a transfer is given up.
        log: takes what became of each transfer; None: nobody wants to know.
        parts: modules that phases may pass by, which must have no hooks then.
        options: as for `StageChunk`.
    """

    def __init__(
        self,
        module: Callable[[Nest], Nest],
        stage: int,
        phases: Sequence[Phase],
        timeout_s: float,
        log: list[Transfer] | None = None,
        parts: Sequence[nn.Module] = (),
        **options: Unpack[ChunkOptions],
    ) -> None:
        super().__init__(module, stage, **options)
        self._parts = parts
        self._hooks = [hooks for part in parts for hooks in hooks_of(part)]  # now and later
        self._called: set[nn.Module] = set()  # of those with hooks
        self._looked_at: set[int] = set()  # phases that communicate
        # The last phase hands over to the next stage or to the loss, so it computes.
        self._phases = [*phases, Phase("out", COMPUTE, as_it_is)] if phases[-1].kind == COMM else list(phases)
        self._timeout_s = timeout_s
        self._segments: dict[int, list[_Segment]] = {}
        self._log = log
        self._filling = Filling(timeout_s)  # of full backwards
        self._fillings: dict[int, Filling] = {}  # of pairs with a backward of that stage

    @property
    def brings_overlap(self) -> bool:
        return self._overlap

    def pairs_with(self, other: StageChunk) -> bool:
        return self._overlap and isinstance(other, PhasedChunk)

    def forward(self, micro: int, inputs: Nest, labels: Nest = None) -> Nest:
        return finish(self._forward_steps(micro, inputs, labels), self._wait)

    def backward(self, micro: int, grads: list[torch.Tensor] | None, scale: float = 1.0) -> list[torch.Tensor]:
        weights: Weights = deque()
        self._filling.begin()
        back = finish(self._backward_steps(micro, grads, scale, weights), partial(self._filling.wait, weights=weights))
        _run_all(weights)
        return back

    def input_backward(self, micro: int, grads: list[torch.Tensor] | None, scale: float = 1.0) -> list[torch.Tensor]:
        weights: Weights = deque()
        back = finish(self._backward_steps(micro, grads, scale, weights), self._wait)
        self._pending[micro] = list(weights)
        return back

    def overlapped(
        self,
        micro: int,
        inputs: Nest,
        labels: Nest,
        other: StageChunk,
        back: int,
        grads: list[torch.Tensor] | None,
        scale: float,
    ) -> Nest:
        """Run F of `micro` here together with the full backward of micro-batch `back` on `other`.

        Returns:
            What `forward` returns, and what `backward` returns.
        """
        assert isinstance(other, PhasedChunk)
        weights: Weights = deque()
        forward = self._forward_steps(micro, inputs, labels)
        backward = other._backward_steps(back, grads, scale, weights)
        filling = self._fillings.setdefault(other.stage, Filling(self._timeout_s))
        filling.begin()
        output, input_grads = interleave(forward, backward, partial(filling.wait, weights=weights))
        _run_all(weights)
        return output, input_grads

    def clear(self) -> None:
        super().clear()
        self._segments.clear()

    def _wait(self, tickets: Tickets) -> None:
        tickets.wait(self._timeout_s)

    def _forward_steps(self, micro: int, inputs: Nest, labels: Nest) -> Steps[Nest]:
        steps = self._steps(micro, inputs, labels)
        return self._looked_after(steps) if any(self._hooks) else steps

    def _looked_after(self, steps: Steps[Nest]) -> Steps[Nest]:
        """Take the steps, and see that each module with hooks has been called."""
        hooked = {part for part in self._parts if any(hooks_of(part))}
        if hooked <= self._called:
            return (yield from steps)
        with noting_calls() as called:
            output = yield from steps
        if missed := hooked - called:
            kinds = " and ".join(sorted({type(part).__name__ for part in missed}))
            raise ConfigError(
                f"stage {self.stage} runs by phases, which pass by the hooks on {kinds}: put those of layers and their "
                'parts there before initialize, which runs such layers whole, or set "overlap": false'
            )
        self._called |= hooked
        return output

    def _steps(self, micro: int, inputs: Nest, labels: Nest) -> Steps[Nest]:
        segments: list[_Segment] = []
        entered, leaves = self._entered(micro, inputs)  # leaves that collect what goes back to the stage before
        for phase, following in pairwise(self._phases):
            travels = phase.kind == COMM
            tickets = Tickets(phase.name, self._log, leads_on=following.kind == COMM)
            if travels:
                yield None
            with self._saving(micro):
                state = phase.run(entered, tickets) if travels else phase.run(entered)
            segments.append(_Segment(leaves, _edges(state, _differentiable(entered) if travels else ()), tickets))
            if travels:
                self._look_at(len(segments) - 1, segments[-1])
            # Before the wait, after which the host has to be quick. What has been posted keeps what it needs.
            entered, leaves = _cut(state)
            del state
            if travels:
                yield tickets
        with self._saving(micro):
            output = self._phases[-1].run(entered)
            self._segments[micro] = segments
            if not self.is_last:
                return self._keep(micro, leaves, output)
            return self._keep_loss(micro, leaves, self.loss_fn(output, labels) if self.loss_fn is not None else output)

    def _look_at(self, number: int, segment: _Segment) -> None:
        """See, at its first time, that a phase that communicates does so in its backward too."""
        if number in self._looked_at or not segment.travels_back:
            return
        self._looked_at.add(number)
        edges = [edge for edge in segment.edges if not isinstance(edge, int)]
        if fault := fault_of_communication(edges, segment.leaves):
            raise ConfigError(f'the communication phase "{self._phases[number].name}" of stage {self.stage} {fault}')

    def _backward_steps(
        self, micro: int, grads: list[torch.Tensor] | None, scale: float, weights: Weights
    ) -> Steps[list[torch.Tensor]]:
        last, segments = self._alive.pop(micro), self._segments.pop(micro)
        with self._keeping_back(weights):
            self._run_backward(last, grads, scale)
        leaves = last.leaves
        back: Grads = [leaf.grad for leaf in leaves]
        for phase, segment in zip(reversed(self._phases[:-1]), reversed(segments), strict=True):
            leaves = segment.leaves
            given = [(edge, grad) for edge, grad in zip(segment.edges, back, strict=True) if grad is not None]
            edges = [edge for edge, _ in given if not isinstance(edge, int)]
            of_edges = [grad for edge, grad in given if not isinstance(edge, int)]
            if phase.kind == COMPUTE:
                with self._keeping_back(weights):
                    if edges:
                        torch.autograd.backward(edges, of_edges)
                back = [leaf.grad for leaf in leaves]
                continue
            back = [None] * len(leaves)
            if segment.travels_back:
                yield None
                # `grad` hands over what the phase has posted; `backward` would copy it before it has arrived.
                if edges:
                    back = list(torch.autograd.grad(edges, leaves, of_edges, allow_unused=True))
                yield segment.tickets
            for edge, grad in given:
                if isinstance(edge, int):
                    before = back[edge]
                    back[edge] = grad if before is None else before + grad
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, back, strict=True)]

    @contextmanager
    def _keeping_back(self, weights: Weights) -> Iterator[None]:
        """Put the weight gradients of the backward in the body into `weights`."""
        if self._store is None:
            yield
            return
        with self._store.defer():
            yield
        weights.extend(self._store.take())


def finish(steps: Steps[Result], wait: Callable[[Tickets], None], posted: Tickets | None = None) -> Result:
    """Run a coroutine to its end, waiting for everything that it posts.

    Args:
        steps: the coroutine.
        wait: called for what it posts.
        posted: what it has posted already.
    """
    try:
        while True:
            if posted is not None:
                wait(posted)
            posted = next(steps)
    except StopIteration as end:
        return end.value


def interleave(first: Steps[First], second: Steps[Result], wait: Callable[[Tickets], None]) -> tuple[First, Result]:
    """Run two coroutines in turns, so that each computes while what the other has posted is under way.

    `second` begins: a backward starts with the communication that comes last in a forward. What `leads_on` to more
    communication, such as numbers of rows, is not worth a turn of its own: the other side computes, and before it posts
    in its turn the first one is let go on. So the host, which has to wait for such numbers, has given the device
    something to do before, and the rows they are for travel under it. A host that computes by itself waits for them at
    once: it could queue nothing first, and the rows would wait for its computation.

    One forward and one backward of a block with the phases attention, dispatch, experts and combine; `>` posts a
    communication phase, which travels while the other side has its turn:

        turn      1           2           3            4           5            finish
        second    >combine'               experts'                 attention'
                                          >dispatch'
        first                 attention                experts                  (waits)
                              >dispatch                >combine

    Returns:
        What each returns.
    """
    sides = (first, second)
    posted: list[Tickets | None] = [None, None]
    results: list[Nest] = [None, None]
    turn = 1
    try:
        while True:
            if (tickets := posted[turn]) is not None:
                wait(tickets)
            while (step := next(sides[turn])) is None:
                other = posted[1 - turn]
                if other is not None and other.leads_on:
                    wait(other)
                    posted[1 - turn] = _next_posted(sides[1 - turn])
            while step.leads_on and step.by_host:  # which computes: the rows would wait for that
                wait(step)
                step = _next_posted(sides[turn])
            posted[turn] = step
            turn = 1 - turn
    except StopIteration as end:
        results[turn] = end.value
    results[1 - turn] = finish(sides[1 - turn], wait, posted[1 - turn])
    return results[0], results[1]


def _next_posted(steps: Steps[Result]) -> Tickets:
    """Resume a coroutine that communicates next."""
    while (step := next(steps)) is None:
        pass
    return step


def _run_all(weights: Weights) -> None:
    while weights:
        weights.popleft()()


def _cut(state: Nest) -> tuple[Nest, list[torch.Tensor]]:
    """Cut the tensors of a state off from the graph.

    Returns:
        The state for the next phase, and a leaf for each tensor that needs a gradient, in order, which collects it. The
        leaf keeps the shape and lets go of the memory: of what it stands for, only its gradient is asked for later.
    """
    leaves: list[torch.Tensor] = []

    def cut(value: Nest) -> Nest:
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        inside = _inside(leaf)
        empty(leaf)
        leaves.append(leaf)
        return inside

    return pytree.tree_map(cut, state), leaves


def _differentiable(state: Nest) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def _edges(state: Nest, leaves: Sequence[torch.Tensor]) -> list[GradientEdge | int]:
    index = {id(leaf): number for number, leaf in enumerate(leaves)}
    return [index[id(out)] if id(out) in index else get_gradient_edge(out) for out in _differentiable(state)]
