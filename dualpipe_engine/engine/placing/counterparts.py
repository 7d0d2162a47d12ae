"""Counterparts: what every process has of its own, and what stands for it in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import ProcessTopology
from torch import Tensor, nn

from ...comm.from_all import from_all
from ..checks.fingerprint import text
from .grid import Place
from .portable import GroupKey, Key, LocalObjects


def own_objects(module: PipelineModule, placed: Place) -> dict[Key, object]:
    """Objects that every rank has its own of: the module and what its specifications name. Collective over the ranks of
    a pipeline.

    An argument of one LayerSpec alone counts if it looks the same on all ranks: it may have been changed with its
    layer.
    """
    found: dict[Key, object] = {}
    uses: Counter[int] = Counter()
    arguments: dict[Key, object] = {}
    for number, spec in enumerate(module._layer_specs):
        if isinstance(spec, LayerSpec):
            found["kind", number] = spec.typename
            found["forward", number] = getattr(spec, "forward_fn", None)
            given = {**dict(enumerate(spec.module_args)), **spec.module_kwargs}
            for key, value in given.items():
                if not isinstance(value, _CARRIED):
                    uses[id(value)] += 1
                    arguments["argument", number, key] = value
        elif not isinstance(spec, nn.Module):
            found["function", number] = spec
    alone = {key: value for key, value in arguments.items() if uses[id(value)] == 1}
    mine = {key: text(vars(value) if hasattr(value, "__dict__") else value, 4) for key, value in alone.items()}
    looks = from_all(mine, module._grid.pp_proc_group)
    differing = {key for each in looks for key, text in each.items() if text != mine.get(key)}
    found |= {key: value for key, value in arguments.items() if key not in differing}
    found["module",] = module
    return {key: value for key, value in found.items() if value is not None}


_CARRIED = (nn.Module, Tensor, int, float, complex, str, bytes, list, dict, set, frozenset, tuple, type(None))


def counterparts(
    module: PipelineModule, own: Mapping[Key, object], placed: Place, device: torch.device, other: int
) -> LocalObjects:
    """What this rank has of its own for layers that go to or come from the pipeline rank `other`.

    Args:
        own: what `own_objects` returns.
        device: where layers run.
    """
    topology = module._grid.topology()
    mine, theirs = placed.rank, other

    def key_of(group: dist.ProcessGroup) -> GroupKey:
        ranks = tuple(dist.get_process_group_ranks(group))
        return _moved(ranks, topology, mine, theirs), _alike(ranks).index(group)

    def group_of(key: GroupKey) -> dist.ProcessGroup | None:
        ranks, index = key
        alike = _alike(ranks)
        return alike[index] if index < len(alike) else None

    return LocalObjects(own, device, key_of, group_of)


def _alike(ranks: tuple[int, ...]) -> list[dist.ProcessGroup]:
    """The process groups of some ranks, in the order in which they were made."""
    known = dist.distributed_c10d._world.pg_group_ranks
    return [group for group, members in known.items() if tuple(sorted(members)) == tuple(sorted(ranks))]


def _moved(ranks: tuple[int, ...], topology: ProcessTopology, source: int, target: int) -> tuple[int, ...]:
    """The ranks that stand at one pipeline position as `ranks` do at another; those of a group over several positions
    stay."""
    coords = [topology.get_coord(rank) for rank in ranks]
    if any(coord.pipe != source for coord in coords):
        return ranks
    return tuple(topology.get_rank(**(coord._asdict() | {"pipe": target})) for coord in coords)
