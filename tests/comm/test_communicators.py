"""Groups of directed edges: every rank of the world takes part, in one order, on any backend without tags."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dualpipe_engine.comm import communicators
from dualpipe_engine.comm.transport import GroupTransport
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.orders.registry import placement_of
from dualpipe_engine.schedule.placement import LINEAR, Placement

CPU = torch.device("cpu")
SOON_S = 20.0


class World:
    """Stands for torch.distributed on one rank of a world in which group calls are only written down."""

    def __init__(self, monkeypatch, rank, everybody, split):
        self.rank, self.calls, self.options = rank, [], []
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(communicators, "from_all", lambda mine: everybody)
        monkeypatch.setattr(communicators, "_can_split", lambda: split)
        monkeypatch.setattr(communicators, "_options", self.make_options)
        monkeypatch.setattr(dist, "split_group", self.split_group)
        monkeypatch.setattr(dist, "new_group", self.new_group)

    def make_options(self, timeout):
        assert timeout.total_seconds() == 5.0
        self.options.append(object())
        return self.options[-1]

    def split_group(self, split_ranks, pg_options, timeout, group_desc):
        assert pg_options is self.options[-1]
        self.calls.append((split_ranks, timeout, group_desc))
        return next((tuple(pair) for pair in split_ranks if self.rank in pair), None)

    def new_group(self, ranks, pg_options, timeout, group_desc):
        assert pg_options is self.options[-1]
        self.calls.append((ranks, timeout, group_desc))
        return tuple(ranks) if self.rank in ranks else None


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("pp", "dp"), [*product((2, 3, 4, 7, 16), (1, 2)), (8, 4)])
def test_one_order_of_calls(monkeypatch, pp, dp, split):
    """All pipelines at once: four splits of the world, or one new group for each edge of the world."""
    rounds = communicators.rounds_of(Placement(LINEAR, pp).edges())
    pipelines = [[rank * dp + replica for rank in range(pp)] for replica in range(dp)]
    told = [tuple(tuple((line[a], line[b]) for a, b in pairs) for pairs in rounds) for line in pipelines]
    everybody = [told[rank % dp] for rank in range(pp * dp)]
    calls = []
    for rank, mine in enumerate(everybody):
        world = World(monkeypatch, rank, everybody, split)
        groups = communicators.open_pairs(mine, 5.0, "edge", CPU)
        calls.append(world.calls)
        assert len(set(map(id, world.options))) == len(world.calls), "options are shared"
        assert all(timeout.total_seconds() == 5.0 for _, timeout, _ in world.calls)
        for pairs, group in zip(mine, groups, strict=True):
            assert group == next((tuple(sorted(pair)) for pair in pairs if rank in pair), None)
    assert all(each == calls[0] for each in calls)
    assert len(calls[0]) == (min(4, 2 * (pp - 1)) if split else 2 * (pp - 1) * dp)


def test_disagreement_about_pipelines(monkeypatch):
    everybody = [(((0, 1),),), (((0, 1),),), (((1, 2),),)]
    for rank, mine in enumerate(everybody):
        World(monkeypatch, rank, everybody, True)
        with pytest.raises(ConfigError, match=r"\[\[0, 1\], \[1, 2\]\] overlap"):
            communicators.open_pairs(mine, 5.0, "edge", CPU)


def test_options_of_nccl(monkeypatch):
    """Few thread blocks, because a posted receive keeps them busy; of each group its own, with the group's timeout."""

    class Options:
        def __init__(self, is_high_priority_stream):
            assert is_high_priority_stream
            self.config = SimpleNamespace(min_ctas=-1, max_ctas=-1)

    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    first, second = (communicators._options(timedelta(seconds=seconds)) for seconds in (5, 6))
    assert first is not second and first.config is not second.config
    assert (first._timeout.total_seconds(), second._timeout.total_seconds()) == (5.0, 6.0)
    assert first.config.min_ctas == 1 and first.config.max_ctas == communicators.MAX_CTAS <= 4


def test_edges_of_placements():
    assert Placement(LINEAR, 3).edges() == ((0, 1), (1, 0), (1, 2), (2, 1))
    for schedule in ("dualpipe", "dualpipev", "zbv"):
        assert placement_of(schedule, 4).edges() == Placement(LINEAR, 4).edges()
    assert Placement(LINEAR, 1).edges() == ()


def _ring(replicas):
    """Pipelines that are rings, as on a placement whose last rank passes on to its first."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group("cpu:gloo", store=dist.PrefixStore("ring", store), rank=rank, world_size=world)
    before = len(dist.distributed_c10d._world.pg_map)
    size = world // replicas
    line = [position * replicas + rank % replicas for position in range(size)]
    position = rank // replicas
    ring = dict.fromkeys(edge for at in range(size) for edge in ((at, (at + 1) % size), ((at + 1) % size, at)))
    transport = GroupTransport(line, position, dist.group.WORLD, CPU, edges=[e for e in ring if e[0] != e[1]])
    made = len(dist.distributed_c10d._world.pg_map) - before
    found = {}
    for step in (1, -1):
        tensor = torch.empty(1)
        ticket = transport.recv(tensor, (position - step) % size, 0)
        transport.send(torch.tensor([float(rank)]), (position + step) % size, 0).wait(SOON_S)
        ticket.wait(SOON_S)
        found[step] = int(tensor)
    transport.close()
    return made, found, len(dist.distributed_c10d._world.pg_map) - before


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (3, 1), (4, 2), pytest.param(8, 1, marks=pytest.mark.all)])
def test_backend_without_tags(ranks, world, replicas):
    results = ranks.run(world, _ring, replicas=replicas)
    size = world // replicas
    for rank, (made, found, left) in enumerate(results):
        assert made == (2 if size == 2 else 4), "two neighbours, two directions"
        assert found == {step: (rank - step * replicas) % world for step in (1, -1)}
        assert left == 0
