""" "tiled_loss" and "tiled_mlp": which modules of a rank run a tile at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from deepspeed.pipe import PipelineModule
from torch import nn

from ...comm.from_all import from_all
from ...errors import ConfigError
from ...runtime.phases import Phased
from ...runtime.tiles import TileableLoss, TiledLayer, Tiles
from ..checks.agreement import raise_everywhere
from ..given import LayerFunction, LossFunction
from .loss import replace_loss
from .module import numbered_layers

#: Last names of feed-forward layers, of our models and of transformers'.
MLP_NAMES = ("mlp", "feed_forward", "ffn", "shared", "shared_expert", "shared_experts")
_ROUTED = ("experts", "router", "gate")  # parts of layers that send tokens to experts


def tile(module: PipelineModule, loss: int | None, mlp: int | None) -> Callable[[], None]:
    """Let the last layer and the loss, and the feed-forward layers, run on tiles. Collective over all ranks.

    Args:
        module: a PipelineModule, placed or not.
        loss: tiles along the sequence for the projection to the vocabulary and the loss; None: whole.
        mlp: tiles for each feed-forward layer; None: whole.

    Returns:
        What undoes it on this rank.

    Raises:
        ConfigError: the last layer has no known projection, the loss is no known sum over tokens, or no layer has a
            feed-forward layer.
    """
    undo: list[Callable[[], None]] = []
    if loss is not None:
        undo += _tile_loss(module, loss)
    if mlp is not None:
        undo += _tile_layers(module, mlp)

    def undo_all() -> None:
        for each in reversed(undo):
            each()

    return undo_all


@contextmanager
def tiled(module: PipelineModule, loss: int | None, mlp: int | None) -> Iterator[None]:
    """`tile` for the body."""
    undo = tile(module, loss, mlp)
    try:
        yield
    finally:
        undo()


def _tile_loss(module: PipelineModule, count: int) -> list[Callable[[], None]]:
    last = len(module._layer_specs) - 1
    layer = next((layer for number, layer in numbered_layers(module) if number == last), None)
    holder = _holder(layer)
    projection = getattr(holder, "projection", None)
    wrong = []
    if layer is not None and not isinstance(projection, nn.Module):
        wrong.append(
            f'"tiled_loss": the last layer ({type(holder).__name__}) has no known projection to the vocabulary: give '
            'it an attribute `projection`, the module that makes logits, or leave out "tiled_loss"'
        )
    loss_fn: LossFunction | None = module.loss_fn
    if not _tileable(loss_fn):
        name = getattr(loss_fn, "__qualname__", type(loss_fn).__name__)
        wrong.append(
            f'"tiled_loss": {name} is not known to be a sum over tokens: give the PipelineModule the loss of the model '
            '(`loss_fn` of its adapter, `dualpipe_engine.models.transformer.loss`), or leave out "tiled_loss"'
        )
    undo: list[Callable[[], None]] = []
    if isinstance(projection, nn.Module) and not wrong:
        tiles = Tiles(projection, count)
        undo = [tiles.undo, partial(setattr, module, "loss_fn", loss_fn)]
        assert loss_fn is not None
        try:
            replace_loss(module, _tiled(loss_fn, tiles))
        except ConfigError as error:
            wrong.append(str(error))
    raise_everywhere(wrong[:1])
    return undo


def _tileable(loss_fn: LossFunction | None) -> bool:
    return _tileable(loss_fn.func) if isinstance(loss_fn, partial) else isinstance(loss_fn, TileableLoss)


def _tiled(loss_fn: LossFunction, tiles: Tiles) -> LossFunction:
    if isinstance(loss_fn, partial):
        return partial(_tiled(loss_fn.func, tiles), *loss_fn.args, **loss_fn.keywords)
    assert isinstance(loss_fn, TileableLoss)
    return loss_fn.tiled(tiles)


def _tile_layers(module: PipelineModule, count: int) -> list[Callable[[], None]]:
    found = {
        f"{number}.{name}": part
        for number, layer in numbered_layers(module)
        if isinstance(layer, nn.Module)
        for name, part in layer.named_modules()
        if name.rpartition(".")[2] in MLP_NAMES and not _routed(part)
    }
    if not any(from_all(bool(found))):
        raise ConfigError(
            f'"tiled_mlp": no layer has a module called {", ".join(MLP_NAMES)}: leave out "tiled_mlp"', everywhere=True
        )
    return [TiledLayer(part, name, count).undo for name, part in found.items()]


def _routed(part: nn.Module) -> bool:
    return isinstance(part, Phased) or any(name in _ROUTED for name, _ in part.named_children())


def _holder(layer: LayerFunction | None) -> object:
    """The module of a layer; a TiedLayerSpec's `forward_fn` has it as its first argument."""
    return layer.args[0] if isinstance(layer, partial) and layer.args else layer
