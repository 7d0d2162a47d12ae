"""Tiles of long sequences: the projection to the vocabulary with the loss, and feed-forward layers, a piece at a time.

Both compute each piece again in the backward, by DeepSpeed's autograd functions (Arctic Long Sequence Training, arXiv
2506.13996, section 3.1), so that of logits `[batch, length, vocabulary]` and of a layer's inner activations one piece
exists at a time. Their weight gradients belong to I: a piece is gone when W would run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP, sequence_tiled_compute
from torch import Tensor, nn

from ..comm.nest import Nest
from ..errors import ConfigError
from .recompute import autocast_now
from .weight_grad import Unsplit

LossFn: TypeAlias = Callable[..., Tensor]

_MARK = "dualpipe_unprojected"


@runtime_checkable
class TileableLoss(Protocol):
    """A loss function that is a sum over tokens, up to a factor that labels alone make."""

    def tiled(self, tiles: Tiles) -> LossFn:
        """The same, of an output whose logits are replaced by what the projection takes."""


class Tiles:
    """The projection of a model's last layer, in whose place the layer returns what it was given.

    Args:
        projection: `[..., hidden]` to logits `[..., vocabulary]`.
        count: tiles along the sequence.
    """

    def __init__(self, projection: nn.Module, count: int) -> None:
        self._project: Callable[[Tensor], Tensor] = projection.forward
        self._projection, self._count = projection, count
        self.undo = _stand_in(projection, _Unprojected())  #: lets the layer return logits again

    def total(self, summed: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
        """The sum of `summed(logits, labels)` over all tiles (scalar).

        Args:
            summed: a sum over tokens.
            hidden: [batch, length, hidden], of the last layer.
            labels: [batch, length].

        Raises:
            ConfigError: the layer does something to its logits before it returns them.
        """
        if not getattr(hidden, _MARK, False):
            raise ConfigError(
                '"tiled_loss": the last layer changes the logits behind its projection (a cap, a scale, a cast), which '
                'tiles would leave out: leave out "tiled_loss"'
            )
        autocast = autocast_now({hidden.device.type})

        def of_tile(hidden: Tensor, labels: Tensor) -> Tensor:
            with autocast():
                return summed(self._project(hidden.contiguous()), labels.contiguous())

        return sequence_tiled_compute(
            of_tile,
            hidden.shape[1],
            min(self._count, hidden.shape[1]),
            {"hidden": hidden.view_as(hidden), "labels": labels},  # a view keeps its memory where a leaf is emptied
            {},
            "hidden",
            list(self._projection.parameters()),
            output_unshard_dimension=0,
            output_reduction="sum",
        )


class _Unprojected(Unsplit):
    """In place of a projection."""

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = hidden.view_as(hidden)
        setattr(hidden, _MARK, True)
        return hidden


class TiledLayer(Unsplit):
    """In place of the forward of a layer that works on each position by itself.

    Args:
        module: takes and returns `[batch, length, hidden]`.
        name: of the module, for messages.
        count: tiles along the sequence.
    """

    def __init__(self, module: nn.Module, name: str, count: int) -> None:
        self._module, self._name, self._count = module, name, count
        self._plain: Callable[..., Nest] = module.forward
        self._checked = False
        self.undo = _stand_in(module, self)  #: gives the module its own forward back

    def __call__(self, *args: Nest, **kwargs: Nest) -> Tensor:
        if len(args) + len(kwargs) != 1:
            raise ConfigError(f'"tiled_mlp": {self._name} takes more than one tensor: leave out "tiled_mlp"')
        (x,) = (*args, *kwargs.values())
        assert isinstance(x, Tensor)
        count = min(self._count, x.shape[-2])
        if not self._checked and torch.is_grad_enabled():
            self._check(x.detach(), count)
        autocast = autocast_now({x.device.type})

        def plain(_: nn.Module, x: Tensor) -> Nest:
            with autocast():
                return self._plain(x.contiguous())  # some make views of it, as GPT-2's

        out: Tensor = TiledMLP.apply(plain, self._module, x, count, list(self._module.parameters()))
        return out

    @torch.no_grad()
    def _check(self, x: Tensor, count: int) -> None:
        """Refuse what tiles would change: other than one position at a time, or random numbers, drawn anew."""
        tile = -(-x.shape[-2] // count)
        before = _random_states(x.device)
        both, first = (self._plain(x[..., : many * tile, :].contiguous()) for many in (2, 1))
        if (
            not isinstance(both, Tensor)
            or both.dim() != x.dim()
            or both.shape[:-1] != (*x.shape[:-2], min(2 * tile, x.shape[-2]))
        ):
            raise ConfigError(f'"tiled_mlp": {self._name} does not return one tensor of its input\'s length')
        if any(not torch.equal(a, b) for a, b in zip(before, _random_states(x.device), strict=True)):
            raise ConfigError(
                f'"tiled_mlp": {self._name} draws random numbers, which its second run in the backward would not '
                "repeat: set its dropout to 0"
            )
        assert isinstance(first, Tensor)
        if not torch.allclose(both[..., :tile, :], first, rtol=1e-2, atol=1e-4 * float(first.abs().max())):
            raise ConfigError(f'"tiled_mlp": {self._name} mixes positions, so that it cannot run on pieces')
        self._checked = True


def _stand_in(module: nn.Module, forward: Callable[..., Nest]) -> Callable[[], None]:
    """Replace the forward of a module; what puts the former one back, which may be the user's."""
    own = vars(module).get("forward")
    module.forward = forward

    def undo() -> None:
        del module.forward
        if own is not None:
            module.forward = own

    return undo


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]
