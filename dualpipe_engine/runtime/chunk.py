"""StageChunk: forward, backward and weight gradient of one stage, one micro-batch at a time.

At the border of a stage the autograd graph is cut: received floating-point tensors become leaves that collect the
gradient to send back, and of the outputs only the gradient edges are kept, so that an output's storage is free as soon
as it has been sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.utils import _pytree as pytree

from ..comm.meta import flatten
from ..comm.nest import Nest
from ..errors import ConfigError
from .offload import NOTHING, Offload
from .weight_grad import DeferredWeightGrads

_unsafe_view = torch.ops.aten._unsafe_view.default


def backward_from(roots: tuple[torch.Tensor | GradientEdge, ...], grads: tuple[torch.Tensor, ...]) -> None:
    """What torch.autograd.backward calls, without its checks: they take longer than a small stage, and ask for the
    storage of outputs that have been sent."""
    if roots:
        _engine_run_backward(roots, grads, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _inside(leaf: torch.Tensor) -> torch.Tensor:
    """The same memory in a tensor that is neither a leaf nor a view of one, so that in-place layers may work on it."""
    return _unsafe_view(leaf, leaf.shape)


def empty(leaf: torch.Tensor) -> None:
    """Keep a leaf's shape and let go of its memory: of what it stands for, only the gradient is asked for later."""
    leaf.data = leaf.new_empty(()).expand(leaf.shape)


def _edge(output: torch.Tensor) -> GradientEdge:
    """Where the gradient of an output goes in. A node of Python's keeps no graph alive, a view's does."""
    node = output.grad_fn
    if node is None or isinstance(node, BackwardCFunction):
        return GradientEdge(output.view_as(output).grad_fn, 0)  # type: ignore[arg-type]
    return GradientEdge(node, output.output_nr)


@dataclass(slots=True)
class Entered:
    """What a stage takes in a micro-batch, made ready by its chunk.

    Args:
        inputs: what its layers get.
        leaves: tensors that collect the gradients of `inputs`.
    """

    inputs: Nest
    leaves: list[torch.Tensor]


@dataclass(slots=True)
class Activation:
    """What a stage keeps of one micro-batch from the start of F to the end of W."""

    leaves: list[torch.Tensor]
    edges: Sequence[torch.Tensor | GradientEdge | None]  # where the gradients go in; outputs until they are let go
    loss: torch.Tensor | None = None
    outputs: list[torch.Tensor] = field(default_factory=list)


class _WhichStage(TypedDict):
    is_last: bool


class ChunkOptions(_WhichStage, total=False):
    """Keywords of `StageChunk`, for those who hand them on."""

    loss_fn: Callable[..., torch.Tensor] | None
    store: DeferredWeightGrads | None
    overlap: bool
    params: Iterable[torch.nn.Parameter]
    offload: Offload | None


class StageChunk:
    """One stage on one rank.

    Args:
        module: the stage; takes what the previous stage passed on (the data loader's inputs for the first).
        stage: global stage number.
        loss_fn: for the last stage, `loss_fn(output, labels)`; None when the stage's output is the loss already.
        is_last: whether the stage makes the loss.
        overlap: use the module's own `overlapped_forward_backward` where it has one.
        store: collects deferred weight gradients during I; None runs I as a full backward and W as nothing.
        params: the parameters of the stage.
        offload: takes what forwards save to host memory, where the plan says so.
    """

    def __init__(
        self,
        module: Callable[[Nest], Nest],
        stage: int,
        *,
        is_last: bool,
        loss_fn: Callable[..., torch.Tensor] | None = None,
        store: DeferredWeightGrads | None = None,
        overlap: bool = True,
        params: Iterable[torch.nn.Parameter] = (),
        offload: Offload | None = None,
    ) -> None:
        self.module = module
        self.stage = stage
        self.is_last = is_last
        self.loss_fn = loss_fn
        self._store = store
        self._offload = offload
        self._params = list(params)
        self._overlap = overlap
        self._keeps_outputs = overlap and hasattr(type(module), "overlapped_forward_backward")
        self._alive: dict[int, Activation] = {}
        self._pending: dict[int, list[Callable[[], None]]] = {}

    @property
    def alive(self) -> int:
        """Activations held: micro-batches between F and W."""
        return len(self._alive.keys() | self._pending.keys())

    def enter(self, inputs: Nest) -> Entered:
        """Make ready what the stage takes; reads none of it, so that it may still be on its way.

        Args:
            inputs: what the stage before has passed on, whose floating-point tensors become leaves that collect a
                gradient, or what the data loader has given to the first stage, where that is up to the user.
        """
        leaves: list[torch.Tensor] = []

        def enter(value: Nest) -> Nest:
            if not isinstance(value, torch.Tensor):
                return value
            if self.stage > 0 and (value.is_floating_point() or value.is_complex()):
                value.requires_grad_()
            if not value.requires_grad:
                return value
            leaves.append(value)
            return _inside(value)

        # A tensor is the usual case, without the cost of a nest.
        entered = enter(inputs) if isinstance(inputs, torch.Tensor) else pytree.tree_map(enter, inputs)
        return Entered(entered, leaves)

    def forward(self, micro: int, inputs: Nest, labels: Nest = None) -> Nest:
        """Run F.

        Args:
            inputs: what the stage takes, or what `enter` has made of it.

        Returns:
            The stage's output, cut off from autograd; for the last stage the loss (scalar, cut off as well). Call
            `release_outputs` when it has been passed on.
        """
        inputs, leaves = self._entered(micro, inputs)
        with self._saving(micro):
            output = self.module(inputs)
            if not self.is_last:
                return self._keep(micro, leaves, output)
            loss = self.loss_fn(output, labels) if self.loss_fn is not None else output
            return self._keep_loss(micro, leaves, loss)

    def release_outputs(self, micro: int) -> None:
        """Keep of the outputs of F only where their gradients go in; their memory is up to who has taken them."""
        kept = self._alive.get(micro)
        if kept is not None and not kept.outputs:
            edges: list[torch.Tensor | GradientEdge | None] = []
            for edge in kept.edges:
                edges.append(_edge(edge) if isinstance(edge, torch.Tensor) else edge)
            kept.edges = edges

    def infer(self, inputs: Nest) -> Nest:
        """Run F without keeping anything; the last stage returns its output, not the loss."""
        return self.module(inputs)

    def backward(self, micro: int, grads: list[torch.Tensor] | None, scale: float = 1.0) -> list[torch.Tensor]:
        """Run a full backward.

        Args:
            grads: gradient of each floating-point output; None for the last stage.
            scale: factor on the loss, for the last stage.

        Returns:
            The gradient of each floating-point input, zeros where the stage did not use it.
        """
        kept = self._alive.pop(micro)
        self._run_backward(kept, grads, scale)
        return self._input_grads(kept)

    def input_backward(self, micro: int, grads: list[torch.Tensor] | None, scale: float = 1.0) -> list[torch.Tensor]:
        """Run I: as `backward`, with the weight gradients kept back for `weight_backward`."""
        if self._store is None:
            self._pending[micro] = []
            return self.backward(micro, grads, scale)
        kept = self._alive.pop(micro)
        with self._store.defer():
            self._run_backward(kept, grads, scale)
        self._pending[micro] = self._store.take()
        return self._input_grads(kept)

    def weight_backward(self, micro: int) -> None:
        """Run W: the weight gradients that I kept back."""
        for closure in self._pending.pop(micro):
            closure()

    def overlapped(
        self,
        micro: int,
        inputs: Nest,
        labels: Nest,
        other: StageChunk,
        back: int,
        grads: list[torch.Tensor] | None,
        scale: float,
    ) -> tuple[Nest, list[torch.Tensor]]:
        """Run F of `micro` here together with the full backward of micro-batch `back` on `other`, with the module's
        own `overlapped_forward_backward` (the protocol of DeepSeek's DualPipe).

        Returns:
            What `forward` returns, and what `backward` returns.
        """
        inputs, leaves = self._entered(micro, inputs)
        kept = other._alive.pop(back)
        loss = None if kept.loss is None else kept.loss * scale
        flat = [inputs] if isinstance(inputs, torch.Tensor) else pytree.tree_leaves(inputs)
        with self._saving(micro):
            output, new_loss = type(self.module).overlapped_forward_backward(  # type: ignore[attr-defined]
                self.module,
                [leaf for leaf in flat if isinstance(leaf, torch.Tensor)],
                self.loss_fn if self.is_last else None,
                labels if isinstance(labels, (list, tuple)) or labels is None else [labels],
                other.module,
                loss,
                kept.outputs if loss is None else None,
                grads,
            )
        passed = self._keep_loss(micro, leaves, new_loss) if self.is_last else self._keep(micro, leaves, output)
        return passed, self._input_grads(kept)

    @property
    def brings_overlap(self) -> bool:
        """Whether a pair can run as one; here: through the module's own `overlapped_forward_backward`."""
        return self._overlap and hasattr(type(self.module), "overlapped_forward_backward")

    def pairs_with(self, other: StageChunk) -> bool:
        """Whether a forward here and a backward on `other` can run through `overlapped`."""
        return self.brings_overlap and type(self) is type(other) and type(self.module) is type(other.module)

    def clear(self) -> None:
        """Drop everything that is kept, after a batch that failed."""
        self._alive.clear()
        self._pending.clear()

    def _saving(self, micro: int) -> AbstractContextManager[object]:
        """Context of what runs for F of a micro-batch, in which its activation may be one that leaves."""
        return NOTHING if self._offload is None else self._offload.saving(self.stage, micro)

    def _entered(self, micro: int, inputs: Nest) -> tuple[Nest, list[torch.Tensor]]:
        """What the layers get, and the leaves that collect its gradients: without memory where the activation leaves,
        but for what the user's data loader has given."""
        entered = inputs if isinstance(inputs, Entered) else self.enter(inputs)
        if self._offload is not None and self.stage > 0 and self._offload.leaves(self.stage, micro):
            for leaf in entered.leaves:
                empty(leaf)
        return entered.inputs, entered.leaves

    def _keep(self, micro: int, leaves: list[torch.Tensor], output: Nest) -> Nest:
        if isinstance(output, torch.Tensor) and output.requires_grad:  # the usual case
            self._alive[micro] = Activation(leaves, [output], outputs=[output] if self._keeps_outputs else [])
            return output.detach()
        tensors, meta = flatten(output)
        if not tensors:
            raise ConfigError(
                f"the output of stage {self.stage} holds no tensor in micro-batch {micro}, but is of type "
                f"{type(output).__name__}: its last layer must return a tensor, or a tuple, list or dict of tensors"
            )
        differentiable = [tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
        edges = [tensor if tensor.requires_grad else None for tensor in differentiable]
        if all(edge is None for edge in edges) and any(param.requires_grad for param in self._params):
            raise ConfigError(
                f"the output of stage {self.stage} needs no gradient in micro-batch {micro}, so that its parameters "
                'would not be trained: if layers are checkpointed, set "pipeline": {"use_reentrant": false}; else look '
                "for torch.no_grad() or detach() in its layers, or freeze its parameters"
            )
        self._alive[micro] = Activation(leaves, edges, outputs=differentiable if self._keeps_outputs else [])
        return meta.build([tensor.detach() for tensor in tensors])

    def _keep_loss(self, micro: int, leaves: list[torch.Tensor], loss: torch.Tensor) -> torch.Tensor:
        if wrong := _no_loss(loss):
            what = (
                "the output of the last layer, which is the loss," if self.loss_fn is None else "what loss_fn returns"
            )
            raise ConfigError(
                f"{what} is {wrong} in micro-batch {micro}: it must be one floating-point number as a tensor that "
                "depends on the parameters; other values can be reported by the PipelineModule's get_additional_losses"
            )
        self._alive[micro] = Activation(leaves, [], loss)
        return loss.detach()

    def _run_backward(self, kept: Activation, grads: list[torch.Tensor] | None, scale: float) -> None:
        if kept.loss is not None:
            if kept.loss.requires_grad:
                backward_from((kept.loss,), (torch.full_like(kept.loss, scale),))
            return
        assert grads is not None
        edges, given = [], []
        for edge, grad in zip(kept.edges, grads, strict=True):
            if edge is not None:
                edges.append(edge)
                given.append(grad)
        backward_from(tuple(edges), tuple(given))

    @staticmethod
    def _input_grads(kept: Activation) -> list[torch.Tensor]:
        grads = []
        for leaf in kept.leaves:
            grads.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        return grads


def _no_loss(loss: object) -> str | None:
    """What is wrong with a loss."""
    if not isinstance(loss, torch.Tensor):
        return f"a {type(loss).__name__}"
    if loss.numel() != 1 or not loss.is_floating_point():
        return f"a tensor {list(loss.shape)} of {loss.dtype}"
    return None if loss.requires_grad else "a tensor that needs no gradient"
