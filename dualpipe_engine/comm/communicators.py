"""Communicators: process groups that all ranks of the world make together, in one order, and connect before use.

A backend that matches by order rather than by tag (NCCL) needs one for each directed edge of a pipeline, and making one
concerns every rank: `ncclCommSplit` is a collective over the world, members or not. So the pairs are made in rounds, in
each of which a rank is in one pair at most. A round is then one split of the world, for all pipelines at once, and the
first message of its communicators, for which NCCL holds the host until the peer sends or receives too, cannot be part
of a circle of ranks that wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError
from .from_all import from_all

Pair = tuple[int, int]  #: two ranks; of a directed edge source and destination

MAX_CTAS = 4  #: thread blocks of a transfer between two ranks: a posted receive keeps them busy until its peer sends

_BESIDE: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def matches_by_tag(group: dist.ProcessGroup) -> bool:
    """Whether messages of a group find each other by tag; else the k-th send meets the peer's k-th receive."""
    return dist.get_backend(group) in ("gloo", "mpi")


def rounds_of(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Cut pairs into rounds in which no rank is twice. The two directions of an edge are two pairs; a line of ranks
    takes four rounds."""
    rounds: list[list[Pair]] = []
    pairs = list(pairs)
    for forwards in (True, False):
        first = len(rounds)
        for pair in pairs:
            if (pair[0] < pair[1]) != forwards:
                continue
            free = (each for each in rounds[first:] if not any(set(pair) & set(other) for other in each))
            taken = next(free, None)
            if taken is None:
                taken = []
                rounds.append(taken)
            taken.append(pair)
    return rounds


def open_pairs(
    rounds: Sequence[Sequence[Pair]], timeout_s: float, name: str, device: torch.device
) -> list[dist.ProcessGroup | None]:
    """Make a process group for every pair of every rank's `rounds`, at all ranks of the world at once.

    Collective over the world. The two ends of a pair are group ranks 0 and 1 in ascending order.

    Args:
        rounds: global ranks of the pairs of this rank's pipeline, the same on all of its ranks.
        timeout_s: seconds after which a transfer of these groups is given up.
        name: says in the groups' descriptions what they are for.
        device: of the tensors.

    Raises:
        ConfigError: pipelines overlap, as where ranks do not agree on one.

    Returns:
        For each round the group of this rank's pair; None where it is in none.
    """
    with _current(device):
        rounds_of_ranks = from_all(tuple(map(tuple, rounds)))
    pipelines = dict.fromkeys(rounds_of_ranks)  # each once, in the order of its lowest rank
    split, mine = _can_split(), dist.get_rank()
    groups: list[dist.ProcessGroup | None] = []
    for number in range(max(map(len, pipelines))):
        pairs = [sorted(pair) for each in pipelines if number < len(each) for pair in each[number]]
        if len({rank for pair in pairs for rank in pair}) < 2 * len(pairs):
            raise ConfigError(
                f"the ranks do not agree on their pipelines: {pairs} overlap; give all ranks of a pipeline the same "
                "process group and rank_mapping"
            )
        kwargs: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s), "group_desc": f"dualpipe_{name}_{number}"}
        if split:
            own = dist.split_group(split_ranks=pairs, pg_options=_options(kwargs["timeout"]), **kwargs)
        else:
            made = [dist.new_group(pair, pg_options=_options(kwargs["timeout"]), **kwargs) for pair in pairs]
            own = next((group for group, pair in zip(made, pairs, strict=True) if mine in pair), None)
        groups.append(own)
    return groups[: len(rounds)]


def connect(groups: Sequence[dist.ProcessGroup | None], pairs: Sequence[Pair | None], device: torch.device) -> None:
    """Pass one message over each of this rank's groups, round by round.

    Args:
        groups: what `open_pairs` has returned.
        pairs: this rank's pair in each round, (source, destination).
        device: of the tensors.
    """
    token = torch.zeros(1, device=device)
    for group, pair in zip(groups, pairs, strict=True):
        if group is not None and pair is not None:
            sends = dist.get_rank() == pair[0]
            post = group.send if sends else group.recv
            post([token], dist.get_group_rank(group, pair[sends]), 0).wait()


def put_beside(group: dist.ProcessGroup, other: dist.ProcessGroup) -> None:
    """Let `other`, of the same ranks, carry what must not queue behind the messages of `group`: see `beside`."""
    _BESIDE[group] = other


def beside(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The communicator for small messages that the host waits for; the group itself where nothing was put beside it."""
    return _BESIDE.get(group, group)


def close(groups: Iterable[dist.ProcessGroup | None]) -> None:
    """Give groups back; the ends of each do so in one order. Those that went with the world are left alone."""
    for group in groups:
        if group is not None:
            _BESIDE.pop(group, None)
        if group is not None and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


@contextmanager
def noting_groups() -> Iterator[list[dist.ProcessGroup]]:
    """Gives a list that holds, after the body, the groups of this rank that the body has made and not given back."""
    before, made = set(dist.distributed_c10d._world.pg_map), list[dist.ProcessGroup]()
    yield made
    made += [group for group in dist.distributed_c10d._world.pg_map if group not in before]


def _can_split() -> bool:
    """Whether one call makes the groups of a whole round: NCCL alone, on the device that the world was bound to. Beside
    another backend the name of a split matters, on which ranks that are in different numbers of groups disagree."""
    world = dist.group.WORLD
    return world is not None and world.bound_device_id is not None and dist.get_backend(world) == "nccl"


def _options(timeout: timedelta) -> dist.ProcessGroupNCCL.Options | None:
    """Of one group, never shared: torch writes the group's ranks, name and timeout into them."""
    if "nccl" not in dist.get_backend(dist.group.WORLD):
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # torch warns where it is another one than the group's
    config: Any = getattr(options, "config", None)
    if hasattr(config, "max_ctas"):
        config.min_ctas, config.max_ctas = 1, MAX_CTAS
    return options


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Object collectives put their tensors on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
