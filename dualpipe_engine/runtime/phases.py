"""Phases: how a layer lets the communication of one micro-batch hide under the computation of another.

A layer with a method `phases()` is run as the list that it returns, one phase after the other, each handing its result
(any nest of tensors and plain values) to the next; the whole list does what the layer's `forward` does. An
expert-parallel transformer block has, for example, attention and routing (compute), counts of rows (comm), dispatch
(comm), experts (compute), combine (comm).

Each phase is an autograd segment of its own: the graph is cut between phases, so that the backward of one phase can
run, or wait, apart from the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn.modules.module import register_module_forward_pre_hook

from ..comm.nest import Nest

COMPUTE = "compute"
COMM = "comm"

_TWICE = (
    "uses a tensor twice, whose gradients would be added up before they have come: let the phase before hand it over "
    "twice, as (x, x)"
)


class Phase(NamedTuple):
    """One phase of a layer.

    Args:
        name: for traces and the overlap report, such as "dispatch".
        kind: "compute" or "comm".
        run: of a compute phase: `run(state) -> state`. Of a comm phase: `run(state, tickets) -> state`, which posts its
            transfers, adds them to `tickets` (`comm.tickets.Tickets`) and does not read their results; the autograd
            functions in it do the same in their backward, with the same `tickets`. A comm phase has no parameters and
            uses each tensor of its state at most once. One that is followed by another comm phase is waited for as soon
            as the other micro-batch has computed something: for what the host must know before it can post.
    """

    name: str
    kind: str
    run: Callable[..., Nest]


def fault_of_communication(edges: Iterable[GradientEdge], leaves: Sequence[Tensor]) -> str | None:
    """Why the backward of a communication phase, which posts and does not wait, would be wrong.

    Args:
        edges: where the gradients of what the phase made go in.
        leaves: what collects the gradients of what it took.
    """
    taken = {id(leaf) for leaf in leaves}
    seen: set[Node] = set()
    fed: set[tuple[Node, int]] = set()
    twice = False
    nodes = [edge.node for edge in edges]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(variable := getattr(node, "variable", None), nn.Parameter) and id(variable) not in taken:
            return "uses a parameter, which would get no gradient: let a phase of computation use it"
        for following, place in node.next_functions:
            if following is not None:
                twice |= (following, place) in fed
                fed.add((following, place))
                nodes.append(following)
    return _TWICE if twice else None


@runtime_checkable
class Phased(Protocol):
    """A layer that offers phases."""

    def phases(self) -> list[Phase]: ...


Hooks = Mapping[int, Callable[..., object]]
"""The hooks of one kind on a module, now and later."""


def hooks_of(module: nn.Module) -> tuple[Hooks, ...]:
    """What runs when a module is called, and not when only its parts are."""
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


def parts_with_parts(layer: object) -> list[nn.Module]:
    """A layer, and its parts that have parts of their own: phases may call these alone, and pass by the hooks on it."""
    if not isinstance(layer, nn.Module):
        return []
    parts = [layer, *(part for part in layer.modules() if next(part.children(), None) is not None)]
    return list(dict.fromkeys(parts))


@contextmanager
def noting_calls() -> Iterator[set[nn.Module]]:
    """Within, the modules that have been called are in the set."""
    called: set[nn.Module] = set()

    def note(module: nn.Module, _: object) -> None:
        called.add(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()


def runs_by_phases(layer: object) -> TypeGuard[Phased]:
    """Whether a layer offers phases, and has no hooks that they would pass by."""
    return isinstance(layer, Phased) and not any(any(hooks_of(part)) for part in parts_with_parts(layer))
