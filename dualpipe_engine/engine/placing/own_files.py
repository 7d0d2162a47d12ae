"""Files for weights and buffers that DeepSpeed writes none of.

dualpipe_layer_05.pt    what a TiedLayerSpec with a `forward_fn` has besides the tied weights
dualpipe_loss.pt        a loss that is a module
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from .loss import loss_module

LOSS = "dualpipe_loss.pt"
PATTERNS = ("dualpipe_layer_*.pt", "dualpipe_loss*.pt")


class OwnFile(NamedTuple):
    """A file of this package, and what a rank has of it.

    Args:
        name: of the file.
        part: the module.
        tensors: those of its tensors that are in the file, by name in the module; never none.
    """

    name: str
    part: nn.Module
    tensors: dict[str, Tensor]


def file_of_layer(number: int) -> str:
    """Name of the file of a layer."""
    return f"dualpipe_layer_{number:02d}.pt"


def own_files(module: PipelineModule, layers: Iterable[int]) -> Iterator[OwnFile]:
    """What a rank has in files of this package.

    Args:
        module: of this rank.
        layers: numbers of those that it holds.
    """
    end = f"-model_{module._grid.get_slice_parallel_rank():02d}.pt" if module._grid.model_parallel_size > 1 else ".pt"
    for number in layers:
        spec = module._layer_specs[number]
        if isinstance(spec, TiedLayerSpec) and spec.forward_fn is not None:
            part = module._modules[str(number)] if str(number) in module._modules else module.tied_modules[spec.key]
            tied = [module._recursive_getattr(part, name) for name in spec.tied_weight_attr]
            held: dict[str, Tensor] = part.state_dict(keep_vars=True)
            own = {name: tensor for name, tensor in held.items() if not any(tensor is each for each in tied)}
            if own:
                yield OwnFile(file_of_layer(number).replace(".pt", end), part, own)
    loss = loss_module(module)
    if loss is not None and (own := loss.state_dict(keep_vars=True)):
        yield OwnFile(LOSS.replace(".pt", end), loss, own)
