"""What layers written for DeepSeek's `dualpipe` import from its `utils`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..runtime.chunk import backward_from


class WeightGradStore:
    """Where a layer of its own leaves its weight gradient while `enabled`, for the W that follows the I.

        if WeightGradStore.enabled:
            WeightGradStore.put(weight_gradient)  # called without arguments, adds to `weight.grad`
        else:
            weight_gradient()

    Layers reach it by name from inside their backward, hence everything belongs to the class: one pipeline of a process
    steps at a time. The pipeline sets `enabled` and takes what was put; `flush` and `pop` are for an
    `overlapped_forward_backward` that schedules weight gradients itself.
    """

    enabled: bool = False
    cache: list[Callable[[], None]] = []
    funcs_queue: deque[list[Callable[[], None]]] = deque()

    @classmethod
    def put(cls, func: Callable[[], None]) -> None:
        """Leave a weight gradient for later."""
        cls.cache.append(func)

    @classmethod
    def take(cls) -> list[Callable[[], None]]:
        """Hand over what was put since the last `take` or `flush`."""
        taken, cls.cache = cls.cache, []
        return taken

    @classmethod
    def flush(cls) -> None:
        """Close the current group of weight gradients and queue it."""
        cls.funcs_queue.append(cls.take())

    @classmethod
    @torch.no_grad()
    def pop(cls) -> None:
        """Run the oldest queued group.

        Raises:
            IndexError: the queue is empty.
        """
        for func in cls.funcs_queue.popleft():
            func()

    @classmethod
    def clear(cls) -> None:
        """Forget everything."""
        cls.cache = []
        cls.funcs_queue = deque()


def run_backward(
    tensors: Sequence[torch.Tensor] | torch.Tensor, grad_tensors: Sequence[torch.Tensor | None] | torch.Tensor | None
) -> None:
    """Backward from several tensors at once, accumulating into the leaves.

    Args:
        tensors: outputs; their storage may be gone, since only their place in the graph counts.
        grad_tensors: their gradients, one each; None only for a scalar.
    """
    outputs = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    given = (grad_tensors,) * len(outputs) if grad_tensors is None else grad_tensors
    given = (given,) if isinstance(given, torch.Tensor) else given
    grads = tuple(torch.ones_like(t) if g is None else g for t, g in zip(outputs, given, strict=True))
    backward_from(outputs, grads)
