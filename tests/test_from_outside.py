"""What a script adds by one line, without a change of the package: a schedule, a transport, a model family."""

from __future__ import annotations

import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import training
from torch import nn

from dualpipe_engine.adapters import Family, families, get_model_adapter, register_family
from dualpipe_engine.comm import transports
from dualpipe_engine.comm.transports import register_transport
from dualpipe_engine.engine.config import read_config
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.op import B, F, Op
from dualpipe_engine.schedule.orders.registry import KNOWN, Schedule, register_schedule
from dualpipe_engine.schedule.placement import LINEAR, Placement
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.compare import compare


def gpipe(num_ranks, num_micro):
    programs = [
        tuple(Op(kind, stage, micro) for kind in (F, B) for micro in range(num_micro)) for stage in range(num_ranks)
    ]
    return Plan(Placement(LINEAR, num_ranks), num_micro, tuple(programs), "mine")


class Plain:
    """Transport by the point-to-point calls of torch.distributed."""

    ahead, whole, sent = None, False, 0

    def __init__(self, ranks, rank, group, device, log=None, *, edges, timeout_s):
        self.rank, self._ranks, self._group = rank, ranks, group

    def send(self, tensor, dst, tag):
        Plain.sent += 1
        return PlainTicket(dist.isend(tensor, self._ranks[dst], group=self._group, tag=tag), tensor)

    def recv(self, tensor, src, tag):
        return PlainTicket(dist.irecv(tensor, self._ranks[src], group=self._group, tag=tag), tensor)

    def close(self):
        pass


class PlainTicket:
    def __init__(self, work, tensor):
        self._work, self._tensor = work, tensor  # which must live until it is done

    def wait(self, timeout_s):
        self._work.wait(timedelta(seconds=timeout_s))

    def done(self):
        return self._work.is_completed()


def loss_of(schedule):
    import dualpipe_engine

    config = training.settings(4, schedule=schedule, optimize=False)
    with dualpipe_engine.initialize(model=training.make_module(2, 2), config=config)[0] as engine:
        losses = [float(engine.train_batch(training.stream(0))) for _ in range(2)]
        return losses, engine.plan.programs[0]


def by_schedule():
    register_schedule("mine", Schedule(LINEAR, gpipe, False, lambda pp: sys.maxsize))
    try:
        return loss_of("mine"), loss_of("1f1b")
    finally:
        del KNOWN["mine"]


def by_transport():
    expected, _ = loss_of("1f1b")
    Plain.sent = 0
    register_transport("gloo", Plain)
    try:
        found, _ = loss_of("1f1b")
    finally:
        transports._ADDED.clear()
    return found, expected, Plain.sent


def test_a_schedule(ranks):
    for (found, program), (expected, other) in ranks.run(2, by_schedule):
        assert found == expected
        assert program != other


def test_a_schedule_is_known_everywhere():
    config = {"train_batch_size": 4, "pipeline": {"schedule": "mine"}}
    with pytest.raises(ConfigError, match='unknown schedule "mine"'):
        read_config(config)
    register_schedule("mine", Schedule(LINEAR, gpipe, False, lambda pp: sys.maxsize))
    try:
        assert read_config(config)[1].schedule == "mine"
        assert "mine" in [row.schedule for row in compare(2, 4)]
    finally:
        del KNOWN["mine"]


def test_a_transport(ranks):
    for found, expected, sent in ranks.run(2, by_transport):
        assert found == expected
        assert sent >= 2 * 4  # a step has four micro-batches, a message each


class TowerForScoring(nn.Sequential):
    config = SimpleNamespace()


def test_a_model_family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    model = TowerForScoring(*(nn.Linear(6, 6) for _ in range(4)))
    adapter = get_model_adapter(model, example_inputs=torch.zeros(1, 6))
    with pytest.raises(ConfigError, match="the loss of TowerForScoring is not known"):
        adapter.loss_fn  # noqa: B018
    register_family(Family(("ForScoring",), lambda model: nn.functional.mse_loss))
    assert adapter.loss_fn(torch.ones(2), torch.zeros(2)) == 1
