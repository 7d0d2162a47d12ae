"""A batch that fails on one rank is raised on all, costs no step, and the next one is trained on as if it had not been.

--all: under every schedule, on first, middle and last stage, with every reduction.
"""

from __future__ import annotations

import failure_runs as runs
import pytest
import training
from lines import Job

from dualpipe_engine.faults.failures import Failures
from dualpipe_engine.faults.lifeline import LATE

DATA = {
    "end": "StopIteration",
    "border": "StopIteration",
    "nothing": "ConfigError",
    "no batch": None,
    "no grad": "RuntimeError",
    "loader": "Boom",
}
LAYERS = {
    "layer": "Boom",
    "backward": "Boom",
    "none": "ConfigError",
    "shape": None,
    "structure": None,
    "many": None,
    "eval layer": "Boom",
}
LOSSES = {
    "loss": "Boom",
    "loss float": "ConfigError",
    "loss tuple": "ConfigError",
    "loss integer": "ConfigError",
    "loss detached": "ConfigError",
    "loss per sample": "ConfigError",
}


def settings(schedule="dualpipe", zero=1, precision="fp32", replicas=1, **pipeline):
    return training.settings(runs.MICROS, replicas, zero, precision, schedule, p2p_timeout_s=60, **pipeline)


def check(found, kinds, lost=None):
    """Every rank has raised an error of its kind, or one that names it."""
    for rank, (errors, same, steps) in enumerate(found):
        assert same and steps[0] == steps[1], (rank, errors, steps)
        for case, kind in errors.items():
            assert kind is not None, f"rank {rank}: {case} has raised nothing"
        for case, kind in kinds.items():
            name, text = errors[case]
            if kind is not None:
                assert name == kind or (kind in text and "No rank has made a step" in text), (case, name, text)
    if lost is not None:
        for case in kinds:
            texts = [errors[case] for errors, _, _ in found]
            assert texts[lost][1] != texts[1 - lost][1] and f"rank {lost} failed in" in texts[1 - lost][1], texts


@pytest.mark.faults_all
@pytest.mark.parametrize("lost", [0, 1])
def test_data_and_layers(ranks, lost):
    kinds = DATA | LAYERS
    found = ranks.run(2, runs.survived, timeout=90, ranks=2, config=settings(), cases=list(kinds), lost=lost)
    check(found, kinds)
    check(found, {"loader": "Boom", "layer": "Boom", "backward": "Boom"}, lost)
    for errors, _, _ in found:
        assert "there is no data" in errors["nothing"][1] and errors["end"][0] == "StopIteration"
        assert (
            "passes on 70 tensors in micro-batch" in errors["many"][1]
            and "dynamic_shape=True" in errors["structure"][1]
        )
        assert "op 0F" in errors["none"][1] and "(Block) has returned None" in errors["none"][1]


@pytest.mark.faults_all
def test_losses(ranks):
    check(ranks.run(2, runs.survived, timeout=90, ranks=2, config=settings("zbv"), cases=list(LOSSES), lost=0), LOSSES)


@pytest.mark.parametrize("case", ["nothing", "layer", "border"])
def test_the_first_batch(ranks, case):
    """Before any rank knows the shapes."""
    found = ranks.run(2, runs.survived, ranks=2, config=settings("zb1p"), cases=[case], lost=0, first=True)
    check(found, {case: (DATA | LAYERS)[case]})


@pytest.mark.faults_all
def test_wrong_arguments_cost_no_engine(ranks, tmp_path):
    found = ranks.run(2, runs.wrongly_called, timeout=60, config=settings(), folder=str(tmp_path))
    clean = ranks.run(2, runs.rightly_called, config=settings(), steps=len(found[0][1]))
    for (errors, losses), expected in zip(found, clean, strict=True):
        assert all(errors.values()), errors
        assert losses == expected


def test_a_nan_that_is_found(ranks):
    found = ranks.run(2, runs.poisoned, ranks=2, config=settings(check_finite=True))
    for first, (kind, text), third, weights in found:
        assert kind == "PipelineRuntimeError" and "NaN in the output" in text
        assert first and third and weights


def test_layers_with_transfers_of_their_own_end_the_job(ranks):
    for (kind, text), (again, why) in ranks.run(2, runs.bound, ranks=2, config=settings()):
        assert kind == "Boom" or "rank 0 is lost: it failed" in text
        assert again == "PipelineRuntimeError" and "start the job again" in why and "Boom: poisoned" in why


def test_experts_have_transfers_of_their_own(ranks):
    assert not any(ranks.run(4, runs.experts, config=settings(replicas=2)))


KINDS = DATA | LAYERS | LOSSES
GRID = [
    ("1f1b", 0, "fp32", {}), ("zb1p", 1, "bf16", {}), ("dualpipe", 0, "bf16", {}), ("dualpipe", 2, "fp32", {}),
    ("dualpipev", 2, "bf16", {}), ("zbv", 1, "fp32", {}), ("dualpipe", 1, "fp32", {"dynamic_shape": True}),
]  # fmt: skip


@pytest.mark.all
@pytest.mark.faults_all
@pytest.mark.parametrize("lost", [0, 1, 3])
@pytest.mark.parametrize(("schedule", "zero", "precision", "module"), GRID)
def test_grid(ranks, schedule, zero, precision, module, lost):
    kinds = dict(KINDS)
    if lost not in ((0,) if schedule in ("dualpipev", "zbv") else (0, 3)):
        del kinds["loader"]  # of ranks that read data
    job = {"ranks": 4, "config": settings(schedule, zero, precision), "cases": list(kinds), "lost": lost}
    for first in (False, True):
        check(ranks.run(4, runs.survived, timeout=120, first=first, **job, **module), kinds)


@pytest.mark.all
@pytest.mark.faults_all
def test_replicas(ranks):
    config = settings(replicas=2)
    found = ranks.run(4, runs.survived, timeout=120, ranks=2, replicas=2, config=config, cases=list(KINDS), lost=1)
    check(found, KINDS)


class Wire:
    """Failures of several ranks, with messages that travel when the test says."""

    def __init__(self, world):
        self.queue = []
        self.ranks = [
            Failures(rank, world, lambda to, message, rank=rank: self.queue.append((rank, to, message)))
            for rank in range(world)
        ]
        for each in self.ranks:
            each.begin()

    def deliver(self, count=1000):
        while self.queue and count:
            source, to, message = self.queue.pop(0)
            self.ranks[to].obey(source, message)
            count -= 1


def settled(rank):
    return rank.settle(0.0, lambda: False)


def test_a_failure_is_settled_when_all_have_heard():
    wire = Wire(3)
    wire.ranks[2].tell(runs.Boom("poisoned"), "op 0F1")
    assert not any(map(settled, wire.ranks)) and not wire.ranks[1].known
    wire.deliver(3)  # to rank 0, and on to both others
    assert all(each.known for each in wire.ranks) and not any(map(settled, wire.ranks))
    wire.deliver()
    assert all(map(settled, wire.ranks))
    assert isinstance(wire.ranks[2].error(), runs.Boom) and "rank 2 failed in op 0F1" in str(wire.ranks[1].error())
    for each in wire.ranks:
        each.end()
        each.begin()
        assert each.error() is None and not each.known and not settled(each)


def test_of_two_failures_the_first_is_told():
    wire = Wire(3)
    wire.ranks[2].tell(runs.Boom("two"), "x")
    wire.ranks[1].tell(runs.Boom("one"), "y")
    wire.deliver()
    assert all(map(settled, wire.ranks)) and "rank 2 failed in x" in str(wire.ranks[0].error())
    assert str(wire.ranks[1].error()) == "one"


def test_a_failure_of_the_next_batch_waits_for_it():
    wire = Wire(2)
    wire.ranks[1].end()
    wire.ranks[1].begin()
    wire.ranks[1].tell(runs.Boom("early"), "x")
    wire.deliver()
    assert not wire.ranks[0].known
    wire.ranks[0].end()
    wire.ranks[0].begin()
    assert wire.ranks[0].known and settled(wire.ranks[0])


def test_nobody_waits_for_a_rank_that_is_lost():
    wire = Wire(2)
    wire.ranks[0].tell(runs.Boom("poisoned"), "x")
    assert not wire.ranks[0].settle(60.0, lambda: True)


def test_ranks_that_fall_behind_after_it_are_told_the_cause():
    """As when a layer has a collective of the user's own, of which nobody knows."""
    job = Job(3, missing=())
    for line in job.lines.values():
        line.failures.begin()
    job.lines[1].failures.tell(runs.Boom("poisoned"), "x")
    assert all(line.failures.settle(10.0, lambda: False) for line in job.lines.values())
    job.lines[0]._raise({"kind": LATE, "rank": None, "at": {}})
    assert all(job.lines[rank].decided.wait(10) for rank in (0, 2))
    assert job.told == {0: "failed 1", 2: "failed 1"}
    job.close()
