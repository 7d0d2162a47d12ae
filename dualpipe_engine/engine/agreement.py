"""Agreement: what must be the same on all ranks is compared at the start, and what differs is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

from ..errors import ConfigError

#: Sections of the DeepSpeed configuration that say what is written down, not what is computed.
_REPORTING = {
    "comet",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
}
_PLAIN = (int, float, str, bool, type(None))


def agree_on_job(settings: dict[str, Any], module: PipelineModule) -> None:
    """Compare the configuration and the layers of all ranks. Collective over all ranks.

    Raises:
        ConfigError: ranks differ; the keys and layers, their values and the ranks are named, the same on every rank.
    """
    kept = {key: value for key, value in settings.items() if key not in _REPORTING}
    facts = {f"configuration key {name}": repr(value) for name, value in _flat(kept)}
    for number, spec in enumerate(module._layer_specs):
        facts[f"layer {number}"] = _layer(spec)
    _compare(facts, missing="absent")


def agree_on_copies(module: PipelineModule) -> None:
    """Compare shape, dtype and `requires_grad` of every parameter with those of its copies. Collective over all ranks.

    Raises:
        ConfigError: copies differ.
    """
    _compare(
        {
            f"parameter {name}": f"{list(param.shape)} {param.dtype}{'' if param.requires_grad else ', frozen'}"
            for name, param in module.named_parameters()
        }
    )


def _flat(section: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + str(key), value


def _layer(spec: Any) -> str:
    """A layer as text that does not depend on the process: its kind and the plain ones of its arguments."""
    if not isinstance(spec, LayerSpec):
        return getattr(spec, "__qualname__", type(spec).__qualname__)
    shown = [repr(each) for each in spec.module_args if isinstance(each, _PLAIN)]
    shown += [f"{key}={each!r}" for key, each in spec.module_kwargs.items() if isinstance(each, _PLAIN)]
    kind = getattr(spec.typename, "__qualname__", str(spec.typename))
    tied = f", tied as {spec.key!r}" if isinstance(spec, TiedLayerSpec) else ""
    return f"{kind}({', '.join(shown)}){tied}"


def _compare(facts: dict[str, str], missing: str | None = None) -> None:
    """Compare facts by name; a rank without one counts as having `missing`, or does not count."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, facts)
    wrong = []
    for name in dict.fromkeys(name for each in found for name in each):
        ranks: dict[str, list[int]] = {}
        for rank, each in enumerate(found):
            value = each.get(name, missing)
            if value is not None:
                ranks.setdefault(value, []).append(rank)
        if len(ranks) > 1:
            sides = [f"{value} on {_ranks(held)}" for value, held in ranks.items()]
            wrong.append(f"{name} is {', '.join(sides)}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(f"the ranks differ: {'; '.join(wrong[:3])}{more}: start all of them with the same job")


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (" ..." if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
