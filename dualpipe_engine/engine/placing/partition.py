"""Cutting the layers of a PipelineModule into stages."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, combinations

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime import utils as ds_utils
from deepspeed.utils import logger
from torch import nn

from ...errors import ConfigError
from ...schedule.cuts import together
from ...schedule.placement import Placement
from ..given import LayerEntry


def stage_of_layer(parts: Sequence[int], layer: int) -> int:
    """The stage of a layer; `parts[s]:parts[s + 1]` are the layers of stage s."""
    return next(stage for stage in range(len(parts) - 1) if parts[stage] <= layer < parts[stage + 1])


def cut_layers(module: PipelineModule, num_stages: int, method: str | None) -> list[int]:
    """Stage borders for `num_stages` stages: `parts[s]:parts[s + 1]` are the layers of stage s.

    The module's own cut is kept where it fits. Without `method` the module's own method, which it does not keep, is
    found from its cut: the first one that makes it.

    Raises:
        ConfigError: there are fewer layers than stages, or the method is unknown or finds no layer.
    """
    check_layers(module, num_stages)
    if method is None and len(module.parts) == num_stages + 1:
        return [int(part) for part in module.parts]
    if method is not None:
        return _cut(module, num_stages, method)
    some = ("type:" + "|".join(names) for size in (1, 2, 3) for names in combinations(_names(module), size))
    for candidate in chain(("parameters", "uniform"), some):
        if _cut(module, len(module.parts) - 1, candidate) == [int(part) for part in module.parts]:
            return _cut(module, num_stages, candidate)
    if module.global_rank == 0:
        logger.warning(
            f"no partition_method is known that cuts the layers as the PipelineModule did: {num_stages} stages are cut "
            'by "parameters" unless "partition_method" in the "pipeline" section says otherwise'
        )
    return _cut(module, num_stages, "parameters")


def kept_together(bounds: Sequence[int], layers: Sequence[LayerEntry], placement: Placement) -> list[int]:
    """Where first and last stage share a rank, a cut that leaves layers whose specification says `with_next` in one
    stage with the layer behind them; see `schedule.cuts.together`."""
    return together.kept_together(bounds, [getattr(layer, "with_next", False) for layer in layers], placement)


def check_layers(module: PipelineModule, num_stages: int) -> None:
    """Refuse fewer layers than stages.

    Raises:
        ConfigError: there are.
    """
    layers = len(module._layer_specs)
    if layers < num_stages:
        raise ConfigError(
            f"{layers} layers cannot fill {num_stages} pipeline stages: use at most {layers} stages, or split the "
            "PipelineModule into more layers"
        )


def layer_name(layer: LayerEntry) -> str:
    """Class or function of an entry of the layer list."""
    if isinstance(layer, LayerSpec):
        return str(layer.typename.__name__)
    return type(layer).__name__ if isinstance(layer, nn.Module) else getattr(layer, "__name__", "")


def _names(module: PipelineModule) -> list[str]:
    """Classes and functions of a module's layers, each once."""
    return list(dict.fromkeys(filter(None, map(layer_name, module._layer_specs))))


def _cut(module: PipelineModule, num_stages: int, method: str) -> list[int]:
    layers = len(module._layer_specs)
    method = method.lower()
    if method == "uniform":
        weights = None
    elif method == "parameters":
        with same_random_state():
            weights = module._count_layer_params()
    elif method.startswith("type:"):
        try:
            chosen = module._find_layer_type(method.removeprefix("type:"))
        except (RuntimeError, re.error) as error:
            raise ConfigError(
                f'partition_method "{method}" finds no layer: behind "type:" stands a regular expression, which is '
                f"looked for in the names of their classes, which are {', '.join(_names(module))}"
            ) from error
        weights = [int(index in chosen) for index in range(layers)]
    else:
        raise ConfigError(
            f'unknown partition_method "{method}": use "pairs", "parameters", "uniform", '
            '"type:<regular expression of the class>", or layers of each stage such as "6,6,5,5"'
        )
    if weights is None:
        parts = ds_utils.partition_uniform(num_items=layers, num_parts=num_stages)
    else:
        parts = ds_utils.partition_balanced(weights=weights, num_parts=num_stages)
    return [int(part) for part in parts]


@contextmanager
def same_random_state() -> Iterator[None]:
    """Leave all random generators as they were: building extra layers must not change the training."""
    python, numpy = random.getstate(), np.random.get_state()
    accelerator = get_accelerator()
    kind = accelerator.device_name()
    devices = [] if kind == "cpu" else [accelerator.current_device()]  # not those of the other ranks of the machine
    with torch.random.fork_rng(devices=devices, device_type="cuda" if kind == "cpu" else kind):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
