"""Blocks of experts in the layers of others ("expert_parallel" in the JSON): found and shared between replicas before
layers are placed, connected after it."""

from __future__ import annotations

import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.auto_ep_comm import DEEPEP_BACKEND
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.module_inject.auto_ep_layer import ReplacementSourceMap, collect_replacement_sources
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from ...comm.from_all import from_all
from ...errors import ConfigError
from ...models.autoep.alike import difference
from ...models.autoep.decoder import offer_phases
from ...models.autoep.find import Found, find_blocks
from ...models.autoep.layer import SharedMoE
from ...models.autoep.weights import Unread
from ..checks.agreement import raise_everywhere
from .carry import layers_of
from .deepspeed_experts import load_own
from .module import PlacedModule
from .param_groups import take_name


class SharingExperts(PipelineEngine):
    """The part of `DualPipeEngine` that knows of these blocks."""

    def _configure_expert_parallel(
        self, model: PipelineModule, collect_sources: bool | None = None
    ) -> ReplacementSourceMap:
        """Blocks have been replaced when the layers were placed."""
        return ReplacementSourceMap()

    def _configure_distributed_model(self, model: PipelineModule) -> None:
        """The flag means checkpoint files of experts; the files of layers hold them here."""
        super()._configure_distributed_model(model)
        self.has_moe_layers = False
        for part in self.module.modules():
            if isinstance(part, MoE):
                load_own(part)


def check_blocks(module: PipelineModule, config: AutoEPConfig) -> None:
    """Look for blocks in the layers that this rank has built. Collective over all ranks.

    Args:
        module: as its constructor left it.
        config: the "expert_parallel" section.

    Raises:
        ConfigError: there are none, or they cannot be shared as the section says; the same on every rank.
    """
    grid = module._grid
    wrong, found = [], 0
    if grid.model_parallel_size > 1:
        wrong.append(
            '"expert_parallel" and tensor parallelism do not go together: build the PipelineModule on a '
            "PipeDataParallelTopology, or leave expert_parallel out"
        )
    if grid.data_parallel_size % config.autoep_size:
        wrong.append(
            f'"expert_parallel": {{"autoep_size": {config.autoep_size}}} does not divide the {grid.data_parallel_size} '
            "replicas of the pipeline, which share the experts: take another size or other numbers of stages and ranks"
        )
    if config.comm_backend == DEEPEP_BACKEND and (backend := dist.get_backend()) != "nccl":
        wrong.append(
            f'"expert_parallel": {{"comm_backend": "{DEEPEP_BACKEND}"}} needs process groups of NCCL, not of '
            f"{backend}: leave it out"
        )
    for number, layer in layers_of(module).items() if not wrong else ():
        try:
            found += len(_blocks(layer.module, number, config))
        except ConfigError as error:
            wrong.append(str(error))
    if not sum(from_all(found)) and not wrong:
        wrong.append(
            'no layer has a block of experts that "expert_parallel" knows: name it by moe_layer_pattern, as a part of '
            "model.layers.N where N is the number of the layer, or leave expert_parallel out"
        )
    raise_everywhere(wrong)


def share_blocks(module: PipelineModule, config: AutoEPConfig) -> None:
    """Let DeepSpeed's layers, with this rank's share of the experts, take the place of the blocks. Experts that nobody
    has read are read now, those of the share alone.

    Args:
        module: as its constructor left it; parameters know their names. Layers go to ranks with the same share.
        config: the "expert_parallel" section.

    Raises:
        ConfigError: one of them does not do what its block does; the same on every rank.
    """
    wrong = []
    rank = module._grid.data_parallel_id % config.autoep_size
    device = get_accelerator().device_name(module.local_rank)
    for number, (_, layer) in layers_of(module).items():
        for path, spec, completed in _blocks(layer, number, config):
            assert layer is not None
            source = layer.get_submodule(path)
            why: str | None
            try:
                made = SharedMoE(spec, source, config.autoep_size, rank, completed).train(source.training)
                why = difference(source, made, config)
            except Exception as error:  # another kind of module under the name that a preset knows
                why = f"cannot take the place of {type(source).__name__} ({type(error).__name__}: {error})"
            if why is not None:
                wrong.append(
                    f'"expert_parallel": layer {number}: DeepSpeed\'s layer by the preset {spec.model_family} {why}: '
                    "take another preset_model, say by the keys of the section what it should do, or leave "
                    "expert_parallel out"
                )
                continue
            if isinstance(layer, Unread) and f"{path}.{spec.experts_name}" in layer.unread:
                made.take(layer, f"{path}.{spec.experts_name}")
            made.to(device)
            sources = collect_replacement_sources(source, made, spec, config.autoep_size, rank).sources
            for param in made.parameters():
                param.ds_pipe_replicated = False
                if (of := sources.get(id(param))) is not None:
                    take_name(param, of[0])
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, made)
    raise_everywhere(wrong)


def read_rest(module: PipelineModule) -> None:
    """Give values to all that has none yet.

    Args:
        module: as its constructor left it.
    """
    for part in list(module.modules()):
        if isinstance(part, Unread):
            part.fill()


def overlap_blocks(module: PlacedModule) -> dict[int, str]:
    """Let layers with shared experts offer phases. Collective over the ranks that share them, which are connected.

    Returns:
        Number of a layer -> why it runs as a whole.
    """
    reasons = {}
    for number in module.dualpipe_layers:
        layer = module._modules.get(str(number))
        if layer is not None and (why := offer_phases(layer)) is not None:
            reasons[number] = why
    return reasons


def connect_blocks(module: PlacedModule) -> None:
    """Let shared experts know the ranks that share them, whose groups are made."""
    for part in module.modules():
        if isinstance(part, SharedMoE):
            part.set_deepspeed_parallelism()


def _blocks(layer: nn.Module | None, number: int, config: AutoEPConfig) -> list[Found]:
    return [] if layer is None else find_blocks(layer, number, config)
