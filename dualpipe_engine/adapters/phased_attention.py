"""A block of a model of transformers in pieces around its attention, whose exchanges are then phases.

    project (compute) -> heads (comm) -> attention (compute) -> tokens (comm) -> the rest (compute)

The block is run as it is up to its attention function. Its forward cannot be entered again in the middle, so it is run
from its beginning once more behind the exchanges, where what has been computed is not computed again. There are two
ways to do that. In the first, the module of the attention does no more than what it has called behind its function
(a projection), and what the block has called before (a norm) hands on what it is given. In the second, which repeats
what is no module, such as rotary angles, all modules before the function give again what they gave: for blocks that
use more of it than the attention's result, such as a norm before two branches, or a gate of the queries' projection.

That one of them does what the block does is not known by names: both are run when the layer is made, and the results
must agree to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.from_all import from_all
from ..comm.nest import Nest
from ..comm.tickets import Tickets
from ..engine.checks.token_mixing import SHARED_HEADS
from ..errors import PipelineRuntimeError
from ..models.head_exchange import Parcel
from ..models.trial import same, unchanged
from ..runtime.phases import COMM, COMPUTE, Phase, hooks_of
from .sequences import AtAttention, Call, SharedHeads
from .stubs import first_tensor


class Layer(Protocol):
    """What is asked of a layer whose ranks share sequences (`Stage`)."""

    def __call__(self, message: Nest) -> Nest: ...

    def carried(self, message: Nest, logits: list[Tensor]) -> Nest: ...

    def handed_on(self, hidden: Tensor, carried: Nest) -> Nest: ...

    def resumed(self, carried: Nest, run: Callable[[], Nest]) -> Nest: ...


class State(NamedTuple):
    """What the pieces of a layer hand on.

    Args:
        parcel: what travels, or has travelled.
        call: of the attention function; None behind it.
        given: positional and keyword arguments of the block.
        made: what the modules gave that will give it again, in the order of their calls.
        carried: what goes past the block.
    """

    parcel: Parcel
    call: Call | None
    given: tuple[tuple[Nest, ...], dict[str, Nest]]
    made: tuple[Nest, ...]
    carried: Nest


class Parts(NamedTuple):
    """What a block calls around its attention function; of modules within others, the outer ones.

    Args:
        before: called by the block before its attention.
        within: called by the attention before the function.
        after: called by the attention behind it.
        nones: what the attention returns beside its result, each None; -1: it returns the result alone.
    """

    before: list[nn.Module]
    within: list[nn.Module]
    after: list[nn.Module]
    nones: int


class PhasedAttention:
    """A layer in pieces.

    Args:
        layer: the layer.
        block: that it runs.
        attention: the module of the block's attention.
        parts: what it calls.
        again: go the second way of those above.
    """

    def __init__(self, layer: Layer, block: nn.Module, attention: nn.Module, parts: Parts, again: bool) -> None:
        self._layer, self._block, self._attention, self._parts = layer, block, attention, parts
        self._shared: SharedHeads = getattr(attention, SHARED_HEADS)
        self._kept = [*parts.before, *parts.within] if again else []
        self._again = again

    def phases(self) -> list[Phase]:
        """The layer up to the results of its attention."""
        return [
            Phase("project", COMPUTE, self._project),
            Phase("heads", COMM, self._travel),
            Phase("attention", COMPUTE, self._attend),
            Phase("tokens", COMM, self._travel),
        ]

    def run_on(self, state: State) -> Nest:
        """The rest of the layer: what it returns."""
        mixed = self._shared.returned(state.parcel)
        args, kwargs = state.given

        def run() -> Nest:
            with ExitStack() as stack:
                if self._again:
                    stack.enter_context(self._shared.knowing(mixed))
                    stack.enter_context(_giving(zip(self._kept, state.made, strict=True)))
                else:
                    stack.enter_context(_doing(self._attention, partial(self._after, mixed.flatten(2))))
                    for part in self._parts.before:
                        stack.enter_context(_doing(part, _handed_on))
                return self._block(*args, **kwargs)

        return self._layer.resumed(state.carried, run)

    def message_of(self, state: State) -> Nest:
        """What of the message that the layer was given goes past its block, as a message."""
        args, kwargs = state.given
        return self._layer.handed_on(first_tensor(*args, **kwargs), state.carried)

    def _project(self, message: Nest) -> State:
        given: list[tuple[tuple[Nest, ...], dict[str, Nest]]] = []
        made: list[Nest] = []

        def note_given(_: nn.Module, args: tuple[Nest, ...], kwargs: dict[str, Nest]) -> None:
            given.append((args, kwargs))

        def note_made(_: nn.Module, args: tuple[Nest, ...], output: Nest) -> None:
            made.append(output)

        hooks = [self._block.register_forward_pre_hook(note_given, with_kwargs=True)]
        hooks += [part.register_forward_hook(note_made) for part in dict.fromkeys(self._kept)]
        try:
            with self._shared.stopping():
                self._layer(message)
        except AtAttention as reached:
            parcel, call = reached.parcel, reached.call
        else:
            raise PipelineRuntimeError(
                f"{type(self._layer).__name__} has not come to its attention: set "
                '"overlap": false for layers that choose'
            )
        finally:
            for hook in hooks:
                hook.remove()
        return State(parcel, call, given[-1], tuple(made), self._layer.carried(message, []))

    def _travel(self, state: State, tickets: Tickets | None) -> State:
        return state._replace(parcel=self._shared.travel(state.parcel, tickets))

    def _attend(self, state: State) -> State:
        assert state.call is not None
        # As a call of the module, which is what those look for who watch calls of attention.
        with _doing(self._attention, partial(self._shared.mixed, self._attention, state.parcel, state.call)):
            return state._replace(parcel=self._attention(), call=None)

    def _after(self, mixed: Tensor, *_: Nest, **__: Nest) -> Nest:
        """What the attention returns of `mixed [batch, length / S, heads * width]`."""
        for part in self._parts.after:
            mixed = part(mixed)
        return mixed if self._parts.nones < 0 else (mixed, *[None] * self._parts.nones)


def phased_attention(layer: Layer, block: nn.Module, message: Nest, group: dist.ProcessGroup) -> PhasedAttention | str:
    """A layer in pieces that do what its forward does. Collective over the ranks that hold it.

    Args:
        layer: of one block, whose attention knows parts of sequences.
        block: that it runs.
        message: to try it with, the same on all ranks.
        group: the ranks, which must all agree: those that share a sequence or experts exchange in one order.

    Returns:
        The pieces, or why there are none.
    """
    attention = [part for part in block.modules() if SHARED_HEADS in vars(part)]
    if (why := _first(_unfit(block, attention), group)) is not None:
        return why
    shared: SharedHeads = getattr(attention[0], SHARED_HEADS)
    with unchanged(block), shared.trying(), torch.no_grad():
        parts = whole = None
        try:
            parts, whole = _traced(layer, block, attention[0], message)
        except Exception as error:  # a forward may raise anything
            why = _said("it does not run on a hidden state alone", error)
        else:
            why = _unknown(block, attention[0], parts)
        if (why := _first(why, group)) is not None:
            return why
        assert parts is not None
        for again in (False, True):
            made = PhasedAttention(layer, block, attention[0], parts, again)
            try:
                fits = same(_in_pieces(made, message), whole)
            except Exception as error:  # likewise
                why = _said("it does not run in pieces", error)
            else:
                why = None if fits else "it does more around its attention than can be done in pieces"
            if (why := _first(why, group)) is None:
                return made
    assert why is not None
    return why


def _unfit(block: nn.Module, attention: list[nn.Module]) -> str | None:
    if len(attention) != 1:
        return f"it has {len(attention)} modules of attention"
    if any(getattr(part, "gradient_checkpointing", False) for part in block.modules()):
        return 'it recomputes activations by itself: set "activation_checkpoint_interval" in the "pipeline" section'
    return "it is compiled" if any(part._compiled_call_impl is not None for part in block.modules()) else None


def _unknown(block: nn.Module, attention: nn.Module, parts: Parts | None) -> str | None:
    if parts is None:
        return "its attention returns more than one tensor"
    hooked = [block, attention, *parts.before, *parts.within]
    if any(any(hooks_of(part)) for part in hooked):
        return "it has hooks around its attention"
    return None


def _first(why: str | None, group: dist.ProcessGroup) -> str | None:
    """The first reason of any rank."""
    return next((each for each in from_all(why, group) if each is not None), None)


def _traced(layer: Layer, block: nn.Module, attention: nn.Module, message: Nest) -> tuple[Parts | None, Nest]:
    """What a block calls, and what its layer returns."""
    around = [part for part in block.modules() if any(inner is attention for inner in part.modules())]
    inside = list(attention.modules())[1:]
    outside = [part for part in block.modules() if part not in around and part not in inside]
    shared: SharedHeads = getattr(attention, SHARED_HEADS)
    torch.manual_seed(0)
    with _called(outside) as before, _called(inside) as within:
        try:
            with shared.stopping():
                layer(message)
        except AtAttention:
            pass
    torch.manual_seed(0)
    results: list[Nest] = []
    hook = attention.register_forward_hook(lambda _, args, output: results.append(output))
    try:
        with _called(inside) as all_inside:
            whole = layer(message)
    finally:
        hook.remove()
    first, *others = results[-1] if isinstance(results[-1], tuple) else results[-1:]
    if not isinstance(first, Tensor) or any(other is not None for other in others):
        return None, whole
    nones = len(others) if isinstance(results[-1], tuple) else -1
    return Parts(before, within, all_inside[len(within) :], nones), whole


def _in_pieces(made: PhasedAttention, message: Nest) -> Nest:
    torch.manual_seed(0)
    state: Nest = message
    for _, kind, run in made.phases():
        state = run(state) if kind == COMPUTE else run(state, None)
    return made.run_on(state)


def _said(what: str, error: Exception) -> str:
    return f"{what} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


@contextmanager
def _called(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """The modules that have been called in the body, once for each call; of those within others, the outer ones."""
    found: list[nn.Module] = []
    running = 0

    def begin(*_: Nest) -> None:
        nonlocal running
        running += 1

    def end(part: nn.Module, *_: Nest) -> None:
        nonlocal running
        running -= 1
        if not running:
            found.append(part)

    hooks = []
    for part in modules:
        hooks += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _doing(module: nn.Module, forward: Callable[..., Nest]) -> Iterator[None]:
    """Let a module do something else in the body."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


@contextmanager
def _giving(made: Iterable[tuple[nn.Module, Nest]]) -> Iterator[None]:
    """Let modules give in the body what they gave before, call by call."""
    left: dict[nn.Module, deque[Nest]] = {}
    for part, output in made:
        left.setdefault(part, deque()).append(output)
    with ExitStack() as stack:
        for part, outputs in left.items():
            stack.enter_context(_doing(part, lambda *_, outputs=outputs, **__: outputs.popleft()))
        yield


def _handed_on(given: Nest, *_: Nest, **__: Nest) -> Nest:
    return given
