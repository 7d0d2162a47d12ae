"""In-place conversion of a `deepspeed.pipe.PipelineModule`: its layers are placed on ranks as a `Placement` says.

The module keeps its identity and its parameter names. A rank builds the layers that it did not hold before and takes
their weights and buffers from the rank that built them, so that seeded, loaded or hand-made weights survive bit for
bit. Layers are registered by their number in the model, so every copy of a stage lists its parameters in one order.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing
from torch import nn

from ..comm.tickets import Transfer
from ..runtime.chunk import StageChunk
from ..runtime.overlap import PhasedChunk, phases_of
from ..runtime.phases import Phased
from ..schedule.placement import Placement
from .experts import whole_experts
from .grid import Place, deepspeed_grid, position_of
from .partition import same_random_state, stage_of_layer

PLACEHOLDER = "nothing_to_train"
"""Parameter of a rank that trains none, always 0: DeepSpeed's optimizers need one."""


class PlacedModule(PipelineModule):
    """What a PipelineModule becomes: the stages of one rank. Made by `place`, never constructed."""

    dualpipe_placement: Placement
    dualpipe_place: Place
    dualpipe_layers: list[int]
    """Layer number of each entry of `forward_funcs`."""

    def stage_owner(self, layer_idx: int) -> int:
        """The pipe position, in DeepSpeed's grid, of the layer."""
        return position_of(self.dualpipe_placement, stage_of_layer(self.parts, layer_idx))

    def ckpt_layer_path(self, ckpt_dir: str, local_layer_idx: int) -> str:
        return super().ckpt_layer_path(ckpt_dir, self.dualpipe_layers[local_layer_idx] - self._local_start)

    def save_state_dict(self, save_dir: str, checkpoint_engine: Any, exclude_frozen_params: bool = False) -> None:
        """As DeepSpeed's; the layer files hold the experts of all ranks, and layer 1 has a file even if it has no
        weights, because DeepSpeed's universal converter knows pipelines by it."""
        first = self._grid.data_parallel_id == 0
        with whole_experts(self, first or self.checkpoint_parallel_write_pipeline):
            super().save_state_dict(save_dir, checkpoint_engine, exclude_frozen_params)
        if first and 1 in self.dualpipe_layers:
            index = self.dualpipe_layers.index(1)
            if not hasattr(self.forward_funcs[index], "state_dict"):
                checkpoint_engine.save(state_dict={}, path=self.ckpt_layer_path(save_dir, index))

    def ckpt_layer_path_list(self, ckpt_dir: str, local_layer_idx: int) -> list[str]:
        return super().ckpt_layer_path_list(ckpt_dir, self.dualpipe_layers[local_layer_idx] - self._local_start)


def place(module: PipelineModule, placement: Placement, bounds: Sequence[int]) -> Place:
    """Convert `module` in place. Collective over all ranks.

    Args:
        module: a PipelineModule as its constructor left it (weights may have been changed since).
        placement: stages on the ranks of one pipeline.
        bounds: stage s has layers bounds[s] to bounds[s+1] - 1.

    Returns:
        This rank's place.
    """
    base_grid = module._grid
    placed = Place(base_grid.topology(), placement, module.global_rank)
    before = [int(part) for part in module.parts]
    module.parts = list(bounds)
    layers = [layer for stage in placed.stages for layer in range(module.parts[stage], module.parts[stage + 1])]

    old_layers = range(before[module.stage_id], before[module.stage_id + 1])
    old = dict(zip(old_layers, module.forward_funcs, strict=True))
    old_tied = dict(module.tied_modules.items())
    functions = _build(module, layers, old, old_tied)
    _move_weights(module, placed, before, old, old_tied)
    module.to(get_accelerator().device_name(module.local_rank))

    kind = type(module)
    module.__class__ = type(kind.__name__, (PlacedModule, kind), {"__module__": kind.__module__})
    module.dualpipe_placement, module.dualpipe_place, module.dualpipe_layers = placement, placed, layers
    module.forward_funcs = functions
    module.fwd_map = {str(layer): index for index, layer in enumerate(layers) if str(layer) in module._modules}
    module._local_start, module._local_stop = 0, len(layers)
    module._grid = deepspeed_grid(base_grid, placement)
    module._topo = module._grid.topology()
    module.stage_id = module._grid.get_stage_id()
    module.num_stages = module._grid.pipe_parallel_size
    if not any(param.requires_grad for param in module.parameters()):
        device = get_accelerator().device_name(module.local_rank)
        module.register_parameter(PLACEHOLDER, nn.Parameter(torch.zeros(1, device=device)))
    for param in module.parameters():
        param.ds_pipe_replicated = False
    module.tied_comms = module._index_tied_modules()
    module._synchronize_tied_weights()
    return placed


_Old = dict[int, Any]


def _build(module: PipelineModule, layers: list[int], old: _Old, old_tied: dict[str, nn.Module]) -> list[Any]:
    """Register the modules of `layers` on `module`, building those that are missing; returns the layer functions."""
    numbered = {str(layer) for layer in range(len(module._layer_specs))}
    for name in [name for name in module._modules if name in numbered]:
        delattr(module, name)
    module.tied_modules = nn.ModuleDict()
    module.tied_weight_attrs = {}
    functions: list[Any] = []
    with same_random_state():
        for layer in layers:
            spec = module._layer_specs[layer]
            if isinstance(spec, TiedLayerSpec):
                if spec.key not in module.tied_modules:
                    module.tied_modules[spec.key] = old_tied[spec.key] if spec.key in old_tied else spec.build()
                    module.tied_weight_attrs[spec.key] = spec.tied_weight_attr
                tied = module.tied_modules[spec.key]
                functions.append(tied if spec.forward_fn is None else partial(spec.forward_fn, tied))
            elif isinstance(spec, (LayerSpec, nn.Module)):
                built = old[layer] if layer in old else spec if isinstance(spec, nn.Module) else spec.build()
                module.add_module(str(layer), built)
                functions.append(built)
            else:
                functions.append(old.get(layer, spec))
    return functions


def _move_weights(
    module: PipelineModule, placed: Place, before: list[int], old: _Old, old_tied: dict[str, nn.Module]
) -> None:
    """Copy parameters and buffers of every layer, with dtype and requires_grad, from the rank that built it to the
    ranks that hold it now."""
    device = torch.device(get_accelerator().device_name(module.local_rank))
    kinds: dict[int | str, list[tuple[torch.dtype, bool]]] = {}
    found: list[Any] = [None] * len(placed.pipeline)
    built = old_tied | {layer: held for layer, held in old.items() if isinstance(held, nn.Module)}
    mine = {key: [(tensor.dtype, tensor.requires_grad) for tensor in _tensors(held)] for key, held in built.items()}
    dist.all_gather_object(found, mine, group=module._grid.pp_proc_group)
    for theirs in found:
        kinds |= theirs
    moved: set[tuple[int | str, int]] = set()
    for layer, spec in enumerate(module._layer_specs):
        if not isinstance(spec, (LayerSpec, nn.Module)):
            continue
        key = spec.key if isinstance(spec, TiedLayerSpec) else layer
        source = stage_of_layer(before, layer)
        for target in placed.placement.replicas(stage_of_layer(module.parts, layer)):
            if target == source or (key, target) in moved:
                continue
            moved.add((key, target))
            if placed.rank == source:
                for tensor in _tensors(built[key]):
                    dist.send(tensor.data.to(device).contiguous().view(-1).view(torch.uint8), placed.pipeline[target])
            elif placed.rank == target:
                held = module.tied_modules[key] if isinstance(key, str) else module._modules[str(key)]
                for tensor, kind in zip(_tensors(held.to(device)), kinds[key], strict=True):
                    _receive(tensor, kind, placed.pipeline[source], device)


def _tensors(held: nn.Module) -> list[torch.Tensor]:
    return [*held.parameters(), *held.buffers()]


def _receive(tensor: torch.Tensor, kind: tuple[torch.dtype, bool], peer: int, device: torch.device) -> None:
    dtype, trained = kind
    raw = torch.empty(tensor.numel() * dtype.itemsize, dtype=torch.uint8, device=device)
    dist.recv(raw, peer)
    tensor.data = raw.view(dtype).view(tensor.shape)
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(trained)


def stage_views(module: PlacedModule) -> dict[int, PipelineModule]:
    """One callable module for each stage of this rank; they share parameters and settings with `module`.

    A view is a shallow copy with its own list of layers, so the PipelineModule's own forward (activation checkpointing,
    seeds, a user's override) runs unchanged for each stage.
    """
    views = {}
    for stage in module.dualpipe_place.stages:
        start, stop = module.parts[stage], module.parts[stage + 1]
        indices = [index for index, layer in enumerate(module.dualpipe_layers) if start <= layer < stop]
        view = copy.copy(module)
        view.forward_funcs = [module.forward_funcs[index] for index in indices]
        view._local_start, view._local_stop = start, stop
        view.is_checkpointable_results, view.is_checkpointable_results_interval = [], None
        view._precompute_checkpointable_values()
        views[stage] = view
    return views


def needs_input_gradient(module: PipelineModule) -> bool:
    """Whether the first stage's inputs must require a gradient, as reentrant activation checkpointing demands."""
    return (
        module.activation_checkpoint_interval > 0
        and module.activation_checkpoint_func is not checkpointing.non_reentrant_checkpoint
    )


def set_activation_checkpointing(module: PipelineModule, section: Mapping[str, Any]) -> None:
    """Apply what the "pipeline" section says of activation checkpointing."""
    if section.get("use_reentrant") is False:
        module.activation_checkpoint_func = checkpointing.non_reentrant_checkpoint
    if section.get("activation_checkpoint_interval", 0) > 0:
        module.activation_checkpoint_interval = section["activation_checkpoint_interval"]


def make_chunk(
    view: PipelineModule,
    stage: int,
    by_phases: bool,
    timeout_s: float,
    log: list[Transfer] | None = None,
    **options: Any,
) -> StageChunk:
    """The chunk that runs a stage.

    Args:
        view: the stage.
        stage: its number.
        by_phases: run it by phases, as `has_phases` allows; all stages of a rank alike, so that they can pair.
        timeout_s: seconds after which a transfer within a phase is given up.
        log: takes what became of the transfers within phases.
        options: of `StageChunk`.
    """
    if not by_phases:
        return StageChunk(_runnable(view), stage, **options)
    recomputed = view.activation_checkpoint_interval > 0

    def recompute(layer: Any) -> bool:
        return recomputed and view._is_checkpointable([layer])

    return PhasedChunk(view, stage, phases_of(view.forward_funcs, recompute), timeout_s, log, **options)


def has_phases(module: PipelineModule) -> bool:
    """Whether any layer of this rank offers phases and nothing stands against running the layers one by one: a
    PipelineModule with a forward of its own, or with `seed_layers`, whose seeds belong to whole layers."""
    own = getattr(type(module), "forward", None) is not PipelineModule.forward
    return not own and not module.seed_layers and any(isinstance(layer, Phased) for layer in module.forward_funcs)


def _runnable(view: PipelineModule) -> Any:
    """The stage as its chunk runs it: the view, its layers alone where its forward does no more than call them, or its
    only layer where that brings `overlapped_forward_backward`."""
    functions = view.forward_funcs
    if len(functions) == 1 and hasattr(type(functions[0]), "overlapped_forward_backward"):
        return functions[0]
    own = type(view).forward is not PipelineModule.forward
    return view if own or view.seed_layers or view.activation_checkpoint_interval > 0 else _Layers(view)


class _Layers:
    """Calls the layers of a stage one after another; PipelineModule's forward takes longer than a small layer."""

    def __init__(self, view: PipelineModule) -> None:
        self._view = view
        self._layers = tuple(view.forward_funcs)
        # Shared with the module that the user holds, who may hang something in later.
        self._hooks = (view._forward_pre_hooks, view._forward_hooks, view._backward_pre_hooks, view._backward_hooks)

    def __call__(self, inputs: Any) -> Any:
        if any(self._hooks):
            return self._view(inputs)
        for layer in self._layers:
            inputs = layer(inputs)
        return inputs
