"""What stages keep of activations, and of layers that are computed again as a whole ("activation_checkpoint_interval").

DeepSpeed checkpoints groups of so many layers of a stage. What is kept of a group is its input, what transfers within
it deliver, since these are not repeated, and behind the last layer what the loss keeps. A stage that runs by phases
(`runtime.phases`) checkpoints each layer by itself. While a group's backward runs, all of it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .activations import Names
from .flows import OF_LOSS
from .model_shape import LayerShape, ModelShape


def layer_activations(layer: LayerShape, width: int, recompute: Names = (), fp8: bool = False) -> int:
    """Bytes of a token that autograd keeps from a layer's forward to its backward.

    Args:
        layer: the layer.
        width: bytes of an element of the weights.
        recompute: names of modules that are computed again.
        fp8: see `Flow.kept`.
    """
    return sum(layer.flow(width).kept(recompute, width, fp8).values())


class Keeping(NamedTuple):
    """How activations are kept.

    Args:
        width: bytes of an element of the weights.
        recompute: names of modules that are computed again.
        interval: layers of a group that is computed again as a whole; 0: there are none.
        fp8: see `Flow.kept`.
    """

    width: int
    recompute: Names = ()
    interval: int = 0
    fp8: bool = False

    def of_layer(self, layer: LayerShape) -> int:
        """Bytes of a token where the layer is not computed again as a whole."""
        return layer_activations(layer, self.width, self.recompute, self.fp8)

    def of_stage(self, model: ModelShape, layers: Sequence[LayerShape]) -> int:
        """Bytes of a token from the forward to the backward of a stage of these layers."""
        total = 0
        for group in self._groups(model, layers):
            kept = sum(map(self.of_layer, group))
            total += min(kept, self._entering(model, group)) if self.interval else kept
        return total

    def again(self, model: ModelShape, layers: Sequence[LayerShape]) -> int:
        """Bytes of a token that are there while the largest group of a stage of these layers is computed again."""
        if not self.interval:
            return 0
        groups = self._groups(model, layers)
        return max(sum(self.of_layer(layer) - self._of_loss(layer) for layer in group) for group in groups)

    def _groups(self, model: ModelShape, layers: Sequence[LayerShape]) -> list[Sequence[LayerShape]]:
        size = 1 if has_phases(model) or not self.interval else self.interval
        return [layers[start : start + size] for start in range(0, len(layers), size)]

    def _entering(self, model: ModelShape, group: Sequence[LayerShape]) -> int:
        """With experts: rows that are dispatched, with the residual and the normed stream, and rows that are combined,
        with the residual. Of layers of ours also what ranks that share sequences exchange; of others that is
        repeated."""
        streams = 1 + sum(3 + 2 * layer.top_k for layer in group if layer.rows)
        delivered = sum(layer.exchanged for layer in group) if model.own else 0
        return self.width * (model.hidden * streams + delivered) + sum(map(self._of_loss, group))

    def _of_loss(self, layer: LayerShape) -> int:
        return layer.flow(self.width).kept((), self.width).get(OF_LOSS, 0)


def has_phases(model: ModelShape) -> bool:
    """Whether layers offer phases, since they have transfers."""
    return any(layer.rows or (model.own and layer.exchanged) for layer in model.layers)
