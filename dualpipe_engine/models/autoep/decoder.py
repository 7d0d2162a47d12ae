"""Phases of a layer around its experts, found by structure.

What a decoder layer does before its experts is run as it is, up to them; the last thing before them is a norm, whose
input is the residual stream. After them it adds what they return to that. That this is so is not known of a layer by
its name: both ways are run when the layer is made, and must agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...comm.nest import Nest
from ...errors import PipelineRuntimeError
from ...runtime.phases import COMM, COMPUTE, Phase, Phased, hooks_of
from ..trial import hidden_state, same, unchanged
from .layer import Reached, SharedMoE, State


@runtime_checkable
class Carrying(Protocol):
    """A layer whose messages hold more than the hidden state."""

    def carried(self, message: Nest, logits: list[Tensor]) -> Nest:
        """What goes past the block.

        Args:
            message: that the layer is given.
            logits: of the router of the block, `[tokens, experts]`.
        """

    def handed_on(self, hidden: Tensor, carried: Nest) -> Nest:
        """What the layer returns when its block returns `hidden`."""


@runtime_checkable
class Exchanging(Protocol):
    """A layer whose ranks share sequences, and may exchange parts of them for heads by phases."""

    def exchanges(self) -> list[Phase]:
        """The layer from its beginning up to the results of its attention; empty: it exchanges by itself."""

    def run_on(self, state: Nest) -> Nest:
        """The rest of its forward.

        Args:
            state: behind `exchanges`.
        """

    def message_of(self, state: Nest) -> Nest:
        """What of the message that the layer was given goes past its block, as a message."""


def offer_phases(layer: nn.Module) -> str | None:
    """Let a layer with experts offer phases, if they do what its forward does. Collective over the ranks that share
    the experts.

    Returns:
        Why it cannot; None if it does, or has nothing to share.
    """
    blocks = [part for part in layer.modules() if isinstance(part, SharedMoE)]
    if not blocks or isinstance(layer, Phased):
        return None
    if len(blocks) > 1:
        return f"it has {len(blocks)} blocks of experts"
    if any(getattr(part, "gradient_checkpointing", False) for part in layer.modules()):
        return 'it recomputes activations by itself: set "activation_checkpoint_interval" in the "pipeline" section'
    around = [part for part in layer.modules() if any(inner is blocks[0] for inner in part.modules())]
    if any(any(hooks_of(part)) for part in around):
        return "it has hooks around the experts"
    with unchanged(layer), blocks[0].by_collectives(), torch.no_grad():
        message = hidden_state(layer, blocks[0].hidden_size)
        try:
            norm, whole = _traced(layer, blocks[0], message)
        except Exception as error:  # a forward may raise anything
            said = (str(error).splitlines() or [""])[0]
            return f"it does not run on a hidden state alone ({type(error).__name__}: {said})"
        if norm is None:
            return "what its experts are given is not the output of a norm or another module"
        phases = _Phases(layer, blocks[0], norm)
        found: Nest = message
        torch.manual_seed(0)
        for _, kind, run in phases.all():
            found = run(found) if kind == COMPUTE else run(found, None)
    if not same(found, whole):
        return "what it does after its experts is more than adding the residual stream"
    layer.__dict__["phases"] = phases.all
    return None


class _Phases:
    """The phases of one layer.

    Args:
        layer: the layer.
        moe: its experts.
        norm: whose output they are given, and whose input is the residual stream.
    """

    def __init__(self, layer: nn.Module, moe: SharedMoE, norm: nn.Module) -> None:
        self._layer, self._moe, self._norm = layer, moe, norm

    def all(self) -> list[Phase]:
        layer = self._layer
        before = layer.exchanges() if isinstance(layer, Exchanging) else []
        return [
            *before,
            Phase("routing", COMPUTE, self._go_on) if before else Phase("attention", COMPUTE, self._attend),
            Phase("counts", COMM, self._moe.count),
            Phase("dispatch", COMM, self._moe.dispatch),
            Phase("experts", COMPUTE, self._moe.compute),
            Phase("combine", COMM, self._moe.combine),
            Phase("sum", COMPUTE, self._finish),
        ]

    def _attend(self, message: Nest) -> State:
        return self._routed(partial(self._layer, message), message)

    def _go_on(self, state: Nest) -> State:
        layer = self._layer
        assert isinstance(layer, Exchanging)
        return self._routed(partial(layer.run_on, state), layer.message_of(state))

    def _routed(self, run: Callable[[], Nest], message: Nest) -> State:
        """What the experts are sent, where `run` runs the layer up to them."""
        residuals: list[Tensor] = []
        hook = self._norm.register_forward_pre_hook(lambda _, args: residuals.append(args[0]))
        try:
            with self._moe.stopping():
                run()
        except Reached as reached:
            hidden = reached.hidden
        else:
            raise PipelineRuntimeError(
                f'{type(self._layer).__name__} has not come to its experts: set "overlap": false for layers that choose'
            )
        finally:
            hook.remove()
        logits: list[Tensor] = []
        hook = self._moe.router.gate.register_forward_hook(lambda *given: logits.append(given[2]))
        try:
            state = self._moe.route(hidden)
        finally:
            hook.remove()
        layer = self._layer
        return state | {
            "residual": residuals[-1],
            "carried": layer.carried(message, logits) if isinstance(layer, Carrying) else None,
        }

    def _finish(self, state: State) -> Nest:
        out = self._moe.finish(state)
        hidden = state["residual"] + (out[0] if isinstance(out, tuple) else out).view_as(state["residual"])
        layer = self._layer
        return layer.handed_on(hidden, state["carried"]) if isinstance(layer, Carrying) else hidden


def _traced(layer: nn.Module, moe: SharedMoE, message: Tensor) -> tuple[nn.Module | None, Nest]:
    """The module whose output the experts are given, and what the layer returns, as DeepSpeed would have it."""
    made: list[tuple[nn.Module, object]] = []
    given: list[Tensor] = []

    def note(part: nn.Module, args: Nest, output: Nest) -> None:
        made.append((part, output))

    hooks = [part.register_forward_hook(note) for part in layer.modules() if part is not layer]
    hooks.append(moe.register_forward_pre_hook(lambda _, args: given.append(args[0])))
    try:
        torch.manual_seed(0)
        with moe.by_itself():
            whole = layer(message)
    finally:
        for hook in hooks:
            hook.remove()
    return next((part for part, output in made if output is given[0]), None), whole
