"""Agreement: what must be the same on all ranks is compared at the start, and what differs is named."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from ...comm.from_all import from_all
from ...errors import ConfigError, DualPipeError
from ..given import LayerEntry, Settings
from .fingerprint import ATTRIBUTE, fingerprint

#: Keys of the DeepSpeed configuration that say what is written down, not what is computed, and the one that scripts put
#: there to tell ranks apart.
_MAY_DIFFER = {
    "comet",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "local_rank",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
}
_PLAIN = (int, float, str, bool, type(None))


def agree_on_schedule(error: DualPipeError | None, schedule: str) -> None:
    """Compare what all ranks have read, before any of them goes its way. Collective over all ranks.

    Args:
        error: what is wrong with the configuration of this rank.
        schedule: that it names.

    Raises:
        DualPipeError: `error`, where each rank has one.
        ConfigError: some ranks have one, or their schedules differ; the same on all ranks.
    """
    read = from_all((None if error is None else str(error), schedule))
    wrong = {rank: text for rank, (text, _) in enumerate(read) if text is not None}
    if error is not None and len(wrong) == len(read):
        error.everywhere = True
        raise error
    for rank, text in wrong.items():
        raise ConfigError(f"rank {rank}, and not all ranks: {text}", everywhere=True)
    ranks: dict[str, list[str]] = {}
    for rank, (_, each) in enumerate(read):
        ranks.setdefault(each, []).append(str(rank))
    if len(ranks) > 1:
        differing = ", ".join(
            f'"{each}" on rank{"s" * (len(held) > 1)} {", ".join(held)}' for each, held in ranks.items()
        )
        raise ConfigError(
            f"the configurations of the ranks name different schedules: {differing}; give all ranks the same "
            '"schedule" in the "pipeline" section',
            everywhere=True,
        )


def agree_on_job(settings: Settings, module: PipelineModule) -> None:
    """Compare the configuration and the layers of all ranks. Collective over all ranks.

    Arguments of layers are compared within each pipeline: replicas that share experts and slices of one model differ
    in them.

    Raises:
        ConfigError: ranks differ; the keys and layers, their values and the ranks are named, the same on every rank.
    """
    grid = module._grid
    pipeline = (f" of replica {grid.data_parallel_id}" if grid.data_parallel_size > 1 else "") + _slice(grid)
    _compare({f"layer {number}{pipeline}": _layer(spec) for number, spec in enumerate(module._layer_specs)})
    kept = {key: value for key, value in settings.items() if key not in _MAY_DIFFER}
    facts = {f"configuration key {name}": repr(value) for name, value in _flat(kept)}
    facts |= {f"layer {number}": _kind(spec) for number, spec in enumerate(module._layer_specs)}
    _compare(facts, missing="absent")


def agree_on_copies(module: PipelineModule, layers: Sequence[int], replica: int) -> None:
    """Compare every layer with its copies, by `fingerprint`. Collective over all ranks.

    Attributes of modules are compared within each pipeline: replicas that share experts and slices of one model differ
    in them.

    Args:
        module: the stages of this rank.
        layers: the layer number of each entry of its `forward_funcs`.
        replica: of the pipeline.

    Raises:
        ConfigError: copies differ.
    """
    grid = module._grid
    known: dict[str, dict[str, str]] = {}
    for number, function in zip(layers, module.forward_funcs, strict=True):
        for name, value in fingerprint(function, str(number)).items():
            copies = f" of replica {replica}" if ATTRIBUTE in name else ""
            known.setdefault(f"{number}{copies}{_slice(grid)}", {})[name] = value
    digests: dict[str, set[int]] = {}
    for of_rank in from_all({key: zlib.crc32(repr(sorted(facts.items())).encode()) for key, facts in known.items()}):
        for key, digest in of_rank.items():
            digests.setdefault(key, set()).add(digest)
    differing = [key for key, of_key in digests.items() if len(of_key) > 1]
    if not differing:
        return
    facts_of_ranks = from_all({key: known[key] for key in differing if key in known})
    names = {key: dict.fromkeys(name for each in facts_of_ranks for name in each.get(key, ())) for key in differing}
    place = _slice(grid)
    _compare(
        {
            f"{_what(known[key].get(name, ''))} {name}{place}": known[key].get(name, "absent")
            for key in differing
            if key in known
            for name in names[key]
        }
    )


def _what(value: str) -> str:
    return "parameter" if value.startswith("[") else "layer"


def raise_everywhere(wrong: list[str], remedy: str = "") -> None:
    """Tell all ranks what any of them has found. Collective over all ranks.

    Args:
        wrong: sentences of this rank.
        remedy: what follows them.

    Raises:
        ConfigError: a rank has found something; the same on every rank.
    """
    texts = list(dict.fromkeys(text for each in from_all(wrong) for text in each))
    if texts:
        more = f"; and {len(texts) - 3} more" if len(texts) > 3 else ""
        raise ConfigError(f"{'; '.join(texts[:3])}{more}{remedy}", everywhere=True)


@contextmanager
def refused_everywhere() -> Iterator[None]:
    """What the body refuses on any rank is refused on all. Collective over all ranks, behind the body.

    Raises:
        ConfigError: of a rank; the same on every rank.
    """
    wrong = []
    try:
        yield
    except ConfigError as error:
        wrong.append(str(error))
    raise_everywhere(wrong)


def _slice(grid: PipelineParallelGrid) -> str:
    return f" of slice {grid.get_slice_parallel_rank()}" if grid.get_slice_parallel_world_size() > 1 else ""


def _flat(section: Settings, path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + str(key), value


def _kind(spec: LayerEntry) -> str:
    if isinstance(spec, LayerSpec):
        return getattr(spec.typename, "__qualname__", str(spec.typename))
    return getattr(spec, "__qualname__", type(spec).__qualname__)


def _layer(spec: LayerEntry) -> str:
    """A layer as text that does not depend on the process: its kind and the plain ones of its arguments."""
    if not isinstance(spec, LayerSpec):
        return _kind(spec)
    shown = [repr(each) for each in spec.module_args if isinstance(each, _PLAIN)]
    shown += [f"{key}={each!r}" for key, each in spec.module_kwargs.items() if isinstance(each, _PLAIN)]
    tied = f", tied as {spec.key!r}" if isinstance(spec, TiedLayerSpec) else ""
    return f"{_kind(spec)}({', '.join(shown)}){tied}"


def _compare(facts: dict[str, str], missing: str | None = None) -> None:
    """Compare facts by name; a rank without one counts as having `missing`, or does not count."""
    facts_of_ranks = from_all(facts)
    wrong = []
    for name in dict.fromkeys(name for each in facts_of_ranks for name in each):
        ranks: dict[str, list[int]] = {}
        for rank, each in enumerate(facts_of_ranks):
            value = each.get(name, missing)
            if value is not None:
                ranks.setdefault(value, []).append(rank)
        if len(ranks) > 1:
            sides = [f"{value} on {_ranks(held)}" for value, held in ranks.items()]
            wrong.append(f"{name} is {', '.join(sides)}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        text = f"the ranks differ: {'; '.join(wrong[:3])}{more}: start all of them with the same job"
        raise ConfigError(text, everywhere=True)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (" ..." if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
