"""The layers of a LightningModule's model: what the user gives, and how it is called in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec
from torch import nn

from dualpipe_engine.comm.nest import Nest
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.runtime.phases import hooks_of

LayerEntry: TypeAlias = Any
"""Of the list that a user gives: a module, or a LayerSpec of DeepSpeed."""

_UNTIED = "say so with deepspeed.pipe.TiedLayerSpec, so that the gradients of both uses are added up"


class Chain(nn.Module):
    """The layers that a process holds before there are stages, under their names; it runs them one after the other.

    Attributes:
        specs: names of layers that are built later, where they run.
    """

    def __init__(self, layers: dict[str, LayerEntry]) -> None:
        super().__init__()
        self.specs = [name for name, layer in layers.items() if not isinstance(layer, nn.Module)]
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                self.add_module(name, layer)

    def forward(self, *inputs: Nest) -> Nest:
        if self.specs:
            raise ConfigError(
                f"layer {self.specs[0]} is a LayerSpec, which is built where its stage runs: give modules to run the "
                "model in one process"
            )
        value = inputs[0] if len(inputs) == 1 else inputs
        for layer in self.children():
            value = layer(value)
        return value


def layers_of(model: nn.Module | Iterable[LayerEntry]) -> dict[str, LayerEntry]:
    """The layers by name: those of an nn.Sequential, or their numbers.

    Raises:
        ConfigError: the model is no chain of layers.
    """
    if isinstance(model, nn.Module) and not isinstance(model, (nn.Sequential, nn.ModuleList)):
        raise ConfigError(
            f"model must be an nn.Sequential or a list of layers, so that it can be cut into stages, got "
            f"{type(model).__name__}"
        )
    if isinstance(model, nn.Module):
        _refuse_more(model)
    layers: dict[str, LayerEntry] = (
        dict(model._modules) if isinstance(model, nn.Module) else {str(index): each for index, each in enumerate(model)}
    )
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        if not isinstance(layer, (nn.Module, LayerSpec)):
            raise ConfigError(f"layer {name} must be an nn.Module or a LayerSpec, got {type(layer).__name__}")
        for param in layer.parameters() if isinstance(layer, nn.Module) else ():
            if owners.setdefault(id(param), name) != name:
                raise ConfigError(f"layers {owners[id(param)]} and {name} share a parameter: {_UNTIED}")
    refuse_released(layers.values())
    return layers


def _refuse_more(model: nn.Module) -> None:
    """Refuse a container that does more than call its layers, which is all that stages do.

    Raises:
        ConfigError: it is one.
    """
    kind = type(model)
    for there, what in (
        (kind.forward not in (nn.Sequential.forward, nn.ModuleList.forward) or "forward" in vars(model), "a forward"),
        (any(hooks_of(model)), "hooks"),
        (model._parameters or model._buffers, "tensors"),
        (model._compiled_call_impl is not None, "a compiled call"),
    ):
        if there:
            raise ConfigError(
                f"the {kind.__name__} given as model has {what} of its own, but stages call its layers one after the "
                "other, and nothing else: make that a part of a layer"
            )


def share_start(layers: Iterable[LayerEntry], device: torch.device) -> None:
    """Give all ranks the weights of rank 0, of layers that all have built. Collective over all ranks.

    Raises:
        ConfigError: they train in another module.
    """
    layers = list(layers)
    refuse_released(layers)
    for layer in layers:
        for tensor in (*layer.parameters(), *layer.buffers()) if isinstance(layer, nn.Module) else ():
            on_device = tensor.detach().to(device)
            dist.broadcast(on_device, 0)
            tensor.data.copy_(on_device)


def release(layers: Iterable[LayerEntry], kept: set[nn.Parameter]) -> None:
    """Give back the memory of parameters that run elsewhere; `refill` makes them whole again."""
    for layer in layers:
        for param in layer.parameters() if isinstance(layer, nn.Module) else ():
            if param not in kept:
                param.data = param.data.new_empty(0)
                param.dualpipe_released = True  # type: ignore[attr-defined]


def refuse_released(layers: Iterable[LayerEntry]) -> None:
    """Refuse layers whose weights are in the stages of another module; each rank has released some of them.

    Raises:
        ConfigError: they are.
    """
    for layer in layers:
        for param in layer.parameters() if isinstance(layer, nn.Module) else ():
            if not param.numel() and hasattr(param, "dualpipe_released"):
                raise ConfigError(
                    "the layers are those of a module that has been fitted, and their weights are in its stages: build "
                    "new layers, or fit that module again"
                )


def refill(layers: dict[str, LayerEntry], state: dict[str, torch.Tensor]) -> None:
    """Give layers that were released, or have trained elsewhere, the weights of `state`, named as in the model."""
    for name, layer in layers.items():
        if isinstance(layer, nn.Module):
            for key, tensor in layer.state_dict(keep_vars=True).items():
                tensor.data = state[f"{name}.{key}"].to(tensor.dtype).clone()
