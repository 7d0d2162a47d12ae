"""The "expert_parallel" section of the DeepSpeed JSON: every key works or is refused before anything is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches

from deepspeed.module_inject.auto_ep_comm import DEEPEP_BACKEND
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, parse_autoep_config, validate_autoep_config

from ...errors import ConfigError
from ..deep_ep import deep_ep_installed

NAME = "expert_parallel"
KEYS = tuple(field.name for field in fields(AutoEPConfig) if not field.name.startswith("_"))
PATTERNS = ("moe_layer_pattern", "expert_pattern", "router_pattern")

_FOLDING = "is for DeepSpeed's tensor parallelism, which a pipeline does not have"
#: Key -> (values that ask for nothing, why others are refused).
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "row_weighting_impl": (("auto", "eager"), "is auto or eager here"),
    "combine_impl": (("auto", "weighted_sum", "legacy_bmm"), "is one of auto, weighted_sum and legacy_bmm here"),
    "async_split_plan": ((False,), "does nothing more: numbers of rows come to the host beside the computation anyway"),
    "expert_tensor_parallel_size": ((1,), _FOLDING),
    "validate_folding_routing": ((False,), _FOLDING),
    "load_balance_coeff": ((None,), "is not supported by DeepSpeed"),
}
_FOR_DEEPEP = ("comm_num_sm", "comm_qp_margin", "comm_max_tokens_per_rank", "row_weighting_impl")
_BOOLS = ("enabled", "use_grouped_mm", "disable_triton_grouped_mm")


def read_section(section: object) -> AutoEPConfig | None:
    """Read the section.

    Returns:
        DeepSpeed's form of it; None where it is not enabled.

    Raises:
        ConfigError: a key is unknown, its value has no meaning, or it could have no effect.
    """
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise ConfigError(f'"{NAME}" must be a section {{...}} of keys, got {section!r}')
    enabled = section.get("enabled", False)
    if not enabled and isinstance(enabled, bool):
        return None
    for key in section:
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1, cutoff=0.6)
            hint = f'did you mean "{near[0]}"?' if near else f"known keys: {', '.join(KEYS)}"
            raise ConfigError(f'unknown key "{key}" in the "{NAME}" section: {hint}')
    for key, (off, why) in REFUSED.items():
        if key in section and section[key] not in off:
            raise _wrong(section, key, f"is refused, because it {why}: leave it out")
    _check_values(section)
    _check_effects(section)
    config = parse_autoep_config(dict(section))
    if config.comm_backend == DEEPEP_BACKEND and not deep_ep_installed():
        raise _wrong(
            section, "comm_backend", "needs the package deep_ep in version 2, which is not installed: leave it out"
        )
    try:
        validate_autoep_config(config, world_size=config.autoep_size, pp_size=1, tp_size=1, sp_size=1)
    except ValueError as error:
        raise ConfigError(f'"{NAME}": {error}') from None
    return config


def _check_values(section: Mapping[str, object]) -> None:
    """What DeepSpeed would take for something else without a word."""
    for key in _BOOLS:
        if not isinstance(section.get(key, False), bool):
            raise _wrong(section, key, "must be true or false")
    size = section.get("autoep_size", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise _wrong(
            section, "autoep_size", "must be a whole number from 1, the ranks that share the experts of a layer"
        )
    top_k = section.get("top_k", "auto")
    if top_k != "auto" and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise _wrong(section, "top_k", 'must be a whole number from 1, or "auto" for that of the model')
    if section.get("route_norm") not in (None, True, False):
        raise _wrong(section, "route_norm", "must be true, false or null")
    for key in PATTERNS:
        pattern = section.get(key)
        try:
            re.compile(pattern if pattern is not None else "")  # type: ignore[call-overload]
        except (re.error, TypeError) as error:
            raise _wrong(section, key, f"must be a regular expression ({error})") from None


def _check_effects(section: Mapping[str, object]) -> None:
    """What would have no effect beside another key."""
    shared = section.get("has_shared_experts") is True
    without = {
        "shared_experts_pattern": (not shared, 'without "has_shared_experts": true'),
        "shared_experts_gate_pattern": (not shared, 'without "has_shared_experts": true'),
        "route_scale": (section.get("routed_scaling_factor", "auto") != "auto", 'beside "routed_scaling_factor"'),
        "top_k_attr": (isinstance(section.get("top_k"), int), 'beside "top_k"'),
        "disable_triton_grouped_mm": (section.get("use_grouped_mm") is False, 'beside "use_grouped_mm": false'),
    }
    deep_ep = section.get("comm_backend") == DEEPEP_BACKEND
    for key in _FOR_DEEPEP:
        without[key] = (not deep_ep, f'without "comm_backend": "{DEEPEP_BACKEND}"')
    without["combine_impl"] = (deep_ep, f'beside "comm_backend": "{DEEPEP_BACKEND}"')
    if deep_ep and section.get("autoep_size", 1) == 1:
        without["comm_backend"] = (True, 'without an "autoep_size" from 2')
    for key, (idle, beside) in without.items():
        if section.get(key) not in (None, "auto") and idle:
            raise _wrong(section, key, f"has no effect {beside}: leave one of them out")


def _wrong(section: Mapping[str, object], key: str, what: str) -> ConfigError:
    return ConfigError(f'"{NAME}": {{"{key}": {section.get(key)!r}}} {what}')
