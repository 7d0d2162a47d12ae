"""Weights that layers of two stages share as objects: on two ranks each would train its own."""

from __future__ import annotations

from collections.abc import Sequence

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from ..checks.agreement import raise_everywhere
from .carry import layers_of
from .partition import stage_of_layer
from .stages import params_of


def check_shared_weights(module: PipelineModule, bounds: Sequence[int]) -> None:
    """Refuse trained weights that layers of two stages of several ranks share without a tie. Collective over all ranks.

    Args:
        module: as its constructor left it.
        bounds: stage s has layers bounds[s] to bounds[s+1] - 1.

    Raises:
        ConfigError: there are some; the same on every rank.
    """
    if module._grid.pipe_parallel_size == 1:
        return  # all layers are on one rank
    here = layers_of(module)
    first: dict[nn.Parameter, int] = {}
    wrong = []
    for number, spec in enumerate(module._layer_specs):
        if isinstance(spec, TiedLayerSpec) or (isinstance(spec, LayerSpec) and number not in here):
            continue  # a layer that was given as an object is known on every rank, one that was built on its own
        stage = stage_of_layer(bounds, number)
        for param in params_of([here[number].function if number in here else spec]):
            before = first.setdefault(param, number)
            if param.requires_grad and (other := stage_of_layer(bounds, before)) != stage:
                wrong.append(
                    f"layers {before} and {number} share a weight of shape {list(param.shape)} and are in stages "
                    f"{other} and {stage}, each of which would train its own: make them TiedLayerSpecs of one key, or "
                    'put them into one stage by "partition_method"'
                )
    raise_everywhere(wrong[:1])
