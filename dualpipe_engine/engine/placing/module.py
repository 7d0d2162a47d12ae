"""In-place conversion of a `deepspeed.pipe.PipelineModule`: its layers are placed on ranks as a `Placement` says.

The module keeps its identity and its parameter names. Layers that a rank did not hold before come from the rank that
built them (`carry`), with all that the user has done to them. Layers are registered by their number in the model, so
every copy of a stage lists its parameters in one order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.utils import logger
from torch import nn

from ...comm.from_all import from_all
from ...errors import CheckpointError, ConfigError
from ...schedule.placement import Placement
from ..checks.agreement import refused_everywhere
from ..checks.fingerprint import difference, fingerprint
from ..given import CheckpointEngine, LayerFunction
from .carry import Layer, carry
from .experts import whole_experts
from .grid import Place, deepspeed_grid, position_of
from .loss import loss_module
from .own_files import OwnFile, own_files
from .param_groups import add_placeholder
from .partition import stage_of_layer


class PlacedModule(PipelineModule):
    """What a PipelineModule becomes: the stages of one rank. Made by `place`, never constructed."""

    dualpipe_placement: Placement
    dualpipe_place: Place
    dualpipe_layers: list[int]
    """Layer number of each entry of `forward_funcs`."""
    dualpipe_unphased: dict[int, str]
    """Layers with shared experts that offer no phases, and why."""
    dualpipe_waits: dict[int, str]
    """Layers that wait for the exchanges of their attention, though phases could hide them, and why."""
    dualpipe_recomputed: dict[str, nn.Module]
    """Modules that are computed again in the backward, by number of the layer and name."""
    dualpipe_counts: bool
    """Whether any layer of the pipeline counts the rows of its experts."""

    def stage_owner(self, layer_idx: int) -> int:
        """The pipe position, in DeepSpeed's grid, of the layer."""
        return position_of(self.dualpipe_placement, stage_of_layer(self.parts, layer_idx))

    def ckpt_layer_path(self, ckpt_dir: str, local_layer_idx: int) -> str:
        return super().ckpt_layer_path(ckpt_dir, self.dualpipe_layers[local_layer_idx] - self._local_start)

    def save_state_dict(
        self, save_dir: str, checkpoint_engine: CheckpointEngine, exclude_frozen_params: bool = False
    ) -> None:
        """As DeepSpeed's; the layer files hold the experts of all ranks, and layer 1 has a file even if it has no
        weights, because DeepSpeed's universal converter knows pipelines by it."""
        first = self._grid.data_parallel_id == 0
        with whole_experts(self, first or self.checkpoint_parallel_write_pipeline):
            super().save_state_dict(save_dir, checkpoint_engine, exclude_frozen_params)
        if first and 1 in self.dualpipe_layers:
            index = self.dualpipe_layers.index(1)
            if not hasattr(self.forward_funcs[index], "state_dict"):
                checkpoint_engine.save(state_dict={}, path=self.ckpt_layer_path(save_dir, index))
        for file in self.own_files() if first else ():
            if file.part is not loss_module(self) or self.dualpipe_place.reads_labels:  # where it is trained
                kept = {
                    name: tensor.detach().clone()
                    for name, tensor in file.tensors.items()
                    if tensor.requires_grad or not (exclude_frozen_params and isinstance(tensor, nn.Parameter))
                }
                checkpoint_engine.save(state_dict=kept, path=os.path.join(save_dir, file.name))

    def own_files(self) -> list[OwnFile]:
        """What this rank has in files of this package."""
        return list(own_files(self, self.dualpipe_layers))

    def load_state_dir(self, load_dir: str, checkpoint_engine: CheckpointEngine, strict: bool = True) -> None:
        """As DeepSpeed's. Collective over all ranks.

        Raises:
            CheckpointError: a file cannot be read, or does not fit a layer of a rank; on all ranks.
        """
        wrong, ties = None, self.__dict__["tied_comms"]
        try:
            self.__dict__["tied_comms"] = {}  # no collective before all ranks have heard
            super().load_state_dir(load_dir, checkpoint_engine, strict)
            self.load_own_files(load_dir, checkpoint_engine)
        except CheckpointError as error:  # of a file that cannot be read
            wrong = str(error)
        except Exception as error:
            wrong = (
                f"{load_dir} does not fit: {error}; load_module_strict=False passes over what is missing or more, but "
                "not over other shapes"
            )
        finally:
            self.__dict__["tied_comms"] = ties
        for rank, text in enumerate(from_all(wrong)):
            if text is not None:
                raise CheckpointError(f"the model of rank {rank} is not loaded: {text}", everywhere=True)
        self._synchronize_tied_weights()

    def load_own_files(self, load_dir: str, checkpoint_engine: CheckpointEngine) -> None:
        """Load what this rank has in files of this package, which a checkpoint of stock DeepSpeed lacks."""
        for file in self.own_files():
            path = os.path.join(load_dir, file.name)
            if os.path.isfile(path):
                file.part.load_state_dict(checkpoint_engine.load(path, map_location="cpu"), strict=False)
            else:
                logger.warning(f"{path} is missing: {', '.join(file.tensors)} stay as they are")

    def _synchronize_tied_weights(self) -> None:
        """The weights of the first layer of each tie, in the order of the model, are those of all."""
        for key, comm in self.tied_comms.items():
            owners = [self.stage_owner(number) for number in _tied_layers(self, key)]
            source = comm["ranks"][sorted(set(owners)).index(owners[0])]
            for name in comm["weight_attr"]:
                dist.broadcast(self._recursive_getattr(comm["module"], name).data, source, group=comm["group"])

    def ckpt_layer_path_list(self, ckpt_dir: str, local_layer_idx: int) -> list[str]:
        return super().ckpt_layer_path_list(ckpt_dir, self.dualpipe_layers[local_layer_idx] - self._local_start)


def numbered_layers(module: PipelineModule) -> Iterator[tuple[int, LayerFunction]]:
    """Layers of this rank with their numbers in the model.

    Args:
        module: a PipelineModule, placed or not.
    """
    start = int(module._local_start)
    count = len(module.forward_funcs)
    numbers = module.dualpipe_layers if isinstance(module, PlacedModule) else range(start, start + count)
    yield from zip(numbers, module.forward_funcs, strict=True)


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
    layers = [layer for stage in placed.stages for layer in range(bounds[stage], bounds[stage + 1])]

    held = carry(module, placed, before, bounds)
    module.parts = list(bounds)
    with refused_everywhere():
        functions = _register(module, {layer: held[layer] for layer in layers})
    del held
    module.to(get_accelerator().device_name(module.local_rank))

    kind = type(module)
    module.__class__ = type(kind.__name__, (PlacedModule, kind), {"__module__": kind.__module__})
    module.dualpipe_placement, module.dualpipe_place, module.dualpipe_layers = placement, placed, layers
    module.dualpipe_unphased, module.dualpipe_waits = {}, {}
    module.dualpipe_recomputed = {}
    module.forward_funcs = functions
    module.fwd_map = {str(layer): index for index, layer in enumerate(layers) if str(layer) in module._modules}
    module._local_start, module._local_stop = 0, len(layers)
    module._grid = deepspeed_grid(base_grid, placement)
    module._topo = module._grid.topology()
    module.stage_id = module._grid.get_stage_id()
    module.num_stages = module._grid.pipe_parallel_size
    if not any(param.requires_grad for param in module.parameters()):
        add_placeholder(module)
    for param in module.parameters():
        param.ds_pipe_replicated = False
    module.tied_comms = module._index_tied_modules()
    module._synchronize_tied_weights()
    return placed


def _register(module: PipelineModule, layers: dict[int, Layer]) -> list[LayerFunction]:
    """Let `module` hold `layers` and no others; returns what a stage calls."""
    numbered = {str(layer) for layer in range(len(module._layer_specs))}
    for name in [name for name in module._modules if name in numbered]:
        delattr(module, name)
    module.tied_modules = nn.ModuleDict()
    module.tied_weight_attrs = {}
    functions: list[LayerFunction] = []
    for number, layer in layers.items():
        spec = module._layer_specs[number]
        if isinstance(spec, TiedLayerSpec):
            functions.append(_register_tied(module, number, spec, layer))
            continue
        if layer.module is not None:
            module.add_module(str(number), layer.module)
        if isinstance(spec, nn.Module) and isinstance(layer.function, nn.Module):
            module._layer_specs[number] = layer.function
        functions.append(layer.function)
    return functions


def _register_tied(module: PipelineModule, number: int, spec: TiedLayerSpec, layer: Layer) -> LayerFunction:
    """A tied layer shares the weights that are tied with the first one of its key, and keeps what else it has: as a
    module of its own, under its number, unless that is nothing."""
    assert layer.module is not None
    if spec.key not in module.tied_modules:
        module.tied_modules[spec.key] = layer.module
        module.tied_weight_attrs[spec.key] = spec.tied_weight_attr
        return layer.function
    first = module.tied_modules[spec.key]
    if layer.module is first:
        return layer.function
    shared = {}
    for name, own in zip(module.tied_weight_attrs[spec.key], spec.tied_weight_attr, strict=True):
        weight, of_first = module._recursive_getattr(layer.module, own), module._recursive_getattr(first, name)
        if weight.shape != of_first.shape:
            raise ConfigError(
                f"layer {number} is tied as {spec.key!r}, but its {own} is {list(weight.shape)} and that of the first "
                f"layer of the tie {list(of_first.shape)}: tie weights of one shape"
            )
        shared[weight] = of_first
    if _nothing_else(layer.module, first, set(shared)) and _usual(spec, layer):
        return first if spec.forward_fn is None else partial(spec.forward_fn, first)
    for part in layer.module.modules():
        for name, param in part._parameters.items():
            if param in shared:
                part._parameters[name] = shared[param]
    module.add_module(str(number), layer.module)
    return layer.function


def _tied_layers(module: PipelineModule, key: str) -> list[int]:
    return [n for n, spec in enumerate(module._layer_specs) if isinstance(spec, TiedLayerSpec) and spec.key == key]


def _usual(spec: TiedLayerSpec, layer: Layer) -> bool:
    function = layer.function
    return function is layer.module or (isinstance(function, partial) and function.func is spec.forward_fn)


def _nothing_else(module: nn.Module, first: nn.Module, shared: set[nn.Parameter]) -> bool:
    """Whether a module has nothing but what it shares with `first`."""
    if difference(fingerprint(module, ""), fingerprint(first, "")) or set(module.parameters()) != shared:
        return False
    return all(torch.equal(own, other) for own, other in zip(module.buffers(), first.buffers(), strict=True))
