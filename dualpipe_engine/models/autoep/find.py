"""Which blocks of a layer DeepSpeed's AutoEP would take the place of, found by its own parser."""

from __future__ import annotations

import copy
import re
from typing import Any, NamedTuple, TypeAlias

from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec, validate_autoep_post_detection
from deepspeed.module_inject.auto_ep_presets.registry import resolve_preset_candidates
from torch import nn

from ...errors import ConfigError

ModelConfig: TypeAlias = Any
"""A configuration of transformers, whose fields depend on the model."""


class Found(NamedTuple):
    """A MoE block within a layer.

    Args:
        path: of the block, from the layer.
        spec: what DeepSpeed's parser says of it.
        config: the section, completed from the model's configuration.
    """

    path: str
    spec: MoELayerSpec
    config: AutoEPConfig


def find_blocks(layer: nn.Module, number: int, config: AutoEPConfig) -> list[Found]:
    """The MoE blocks of one layer of a pipeline.

    Names are those that the parts of the layer have in it, which are those of the whole model for a layer of an
    adapter; else `model.layers.NUMBER.` stands before them, as in the models of transformers.

    Args:
        layer: the layer, which may be on the meta device.
        number: of the layer in the pipeline.
        config: the "expert_parallel" section.

    Raises:
        ConfigError: the section does not suit a block.
    """
    known = _config_of(layer)
    for prefix in ("", f"model.layers.{number}."):
        root = _rooted(layer, prefix, known)
        completed = copy.copy(config)
        try:
            if not _has_blocks(root, config, known):
                continue
            specs = AutoEP(root, completed).ep_parser()
            _check(specs, config, known, number)
            validate_autoep_post_detection(completed, specs)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f'"expert_parallel": layer {number}: {error}') from None
        return [Found(spec.moe_module_name.removeprefix(prefix), spec, completed) for spec in specs]
    return []


def _config_of(layer: nn.Module) -> ModelConfig:
    """The configuration of the model that the layer is of."""
    configs = (getattr(part, "config", None) for part in layer.modules())
    return next((each for each in configs if hasattr(each, "model_type")), None)


def _rooted(layer: nn.Module, prefix: str, config: ModelConfig) -> nn.Module:
    """A module that has the layer below `prefix`, and the configuration."""
    root: nn.Module = nn.Module()
    for name, child in layer.named_children() if not prefix else ():
        root.add_module(name, child)
    at = root
    *path, last = prefix.rstrip(".").split(".")
    for name in path:
        at.add_module(name, nn.Module())
        at = at.get_submodule(name)
    if last:
        at.add_module(last, layer)
    root.__dict__["config"] = config
    return root


def _has_blocks(root: nn.Module, config: AutoEPConfig, known: ModelConfig) -> bool:
    """Whether the parser would find anything; it refuses a part of a model that has none."""
    for _, preset in resolve_preset_candidates(config, known):
        pattern = re.compile(preset.moe_layer_pattern)
        for name, part in root.named_modules():
            children = dict(part.named_children())
            if pattern.fullmatch(name) and {preset.experts_pattern, preset.router_pattern} <= children.keys():
                return True
    return False


def _check(specs: list[MoELayerSpec], config: AutoEPConfig, known: ModelConfig, number: int) -> None:
    """What DeepSpeed would say in other words, or pass over."""
    for spec in specs:
        if spec.num_experts % config.autoep_size:
            sizes = [size for size in range(1, spec.num_experts + 1) if not spec.num_experts % size]
            raise ConfigError(
                f'"expert_parallel": {{"autoep_size": {config.autoep_size}}} does not divide the {spec.num_experts} '
                f"experts of layer {number}: take one of {', '.join(map(str, sizes))}"
            )
        if config.has_shared_experts is True and not spec.has_shared_experts:
            raise ConfigError(
                f'"expert_parallel": {{"has_shared_experts": true}}: layer {number} has none under the name '
                f"{config.shared_experts_pattern!r}: give their name as shared_experts_pattern, or leave it out"
            )
        if config.route_scale not in (1.0, spec.route_scale) and config.routed_scaling_factor == "auto":
            raise ConfigError(
                f'"expert_parallel": {{"route_scale": {config.route_scale}}} has no effect, as the model\'s '
                f"configuration says {spec.route_scale}: set routed_scaling_factor"
            )
    for key in ("num_experts_attr", "top_k_attr"):
        attribute = getattr(config, key)
        if attribute is not None and not hasattr(known, attribute):
            raise ConfigError(
                f'"expert_parallel": {{"{key}": "{attribute}"}}: the model\'s configuration has no {attribute}: leave '
                "it out"
            )
