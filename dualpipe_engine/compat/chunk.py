"""One stage as DeepSeek's `dualpipe` package calls it: `module(*inputs)`, `criterion(*outputs, *labels)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..comm.nest import Nest
from ..errors import ConfigError
from ..runtime.chunk import StageChunk
from ..runtime.weight_grad import DeferredWeightGrads
from .weight_grad_store import WeightGradStore as DeepSeekStore


class SharedStore(DeferredWeightGrads):
    """A store that also takes what layers put into DeepSeek's `WeightGradStore`."""

    @contextmanager
    def defer(self) -> Iterator[None]:
        before, DeepSeekStore.enabled = DeepSeekStore.enabled, True
        try:
            with super().defer():
                yield
        finally:
            DeepSeekStore.enabled = before

    def take(self) -> list[Callable[[], None]]:
        # A layer's closure may use saved activations, which still belong to the graph.
        own = [torch.no_grad()(func) for func in DeepSeekStore.take()]
        return own + super().take()


class PairedChunk(StageChunk):
    """A stage of a `DualPipe` or `DualPipeV`; what it takes and hands on is a tuple. See `StageChunk`.

    `forward` serves inference too: where autograd is off, nothing is kept for a backward.

    Attributes:
        returns_outputs: keep the last stage's outputs of the batch in `returned`.
        returned: micro-batch -> outputs, cut off from autograd.
    """

    returns_outputs = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.returned: dict[int, tuple[Nest, ...]] = {}

    def forward(self, micro: int, inputs: Nest, labels: Nest = None) -> Nest:
        inputs, leaves = self._entered(micro, inputs)
        outputs = self._as_tuple(self.module(*inputs))  # type: ignore[call-arg]
        loss = self.loss_fn(*outputs, *labels) if self.is_last and self.loss_fn is not None else None
        return self._hand_on(micro, leaves, outputs, loss)

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
        inputs, leaves = self._entered(micro, inputs)
        kept = other._alive.pop(back)
        outgoing = zip(kept.outputs, grads or (), strict=True) if kept.loss is None else ()
        pairs = [(output, grad) for output, grad in outgoing if output.requires_grad]
        outputs, loss = type(self.module).overlapped_forward_backward(  # type: ignore[attr-defined]
            self.module,
            list(inputs),
            self.loss_fn if self.is_last else None,
            list(labels) if self.is_last else [],
            other.module,
            kept.loss,
            [output for output, _ in pairs],
            [grad for _, grad in pairs],
        )
        return self._hand_on(micro, leaves, self._as_tuple(outputs), loss), self._input_grads(kept)

    def _hand_on(
        self, micro: int, leaves: list[torch.Tensor], outputs: tuple[Nest, ...], loss: torch.Tensor | None
    ) -> Nest:
        if self.is_last and self.returns_outputs:
            self.returned[micro] = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, outputs)
        if self.is_last and self.loss_fn is not None and not isinstance(loss, torch.Tensor):
            raise ConfigError(
                f"criterion must return the loss of micro-batch {micro} as a tensor, got {type(loss).__name__}"
            )
        if not torch.is_grad_enabled():
            return loss if self.is_last else outputs
        return self._keep_loss(micro, leaves, loss) if loss is not None else self._keep(micro, leaves, outputs)

    def _as_tuple(self, outputs: Nest) -> tuple[Nest, ...]:
        if not isinstance(outputs, torch.Tensor | tuple | list):
            raise ConfigError(
                f"stage {self.stage} returns {type(outputs).__name__}: it must return a tensor, or a tuple or list of "
                "tensors, which are the arguments of the next stage or of criterion"
            )
        return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
