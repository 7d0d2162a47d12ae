"""The engine on the strict twin of NCCL: a sample of the parity grid."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import strict_runs

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
import training

# schedule, pipeline ranks, micro-batches, replicas, ZeRO stage, eager groups, operations in flight
GRID = [
    ("dualpipe", 4, 7, 1, 1, True, 8),
    ("dualpipe", 2, 4, 2, 2, False, 6),
    ("dualpipev", 3, 5, 1, 0, False, 8),
    ("dualpipev", 2, 4, 2, 1, True, 6),
    ("zbv", 2, 3, 2, 0, True, 8),
    ("zb1p", 3, 4, 1, 2, True, 6),
    ("1f1b", 4, 3, 1, 1, False, 6),
]


@pytest.mark.parametrize(("schedule", "pp", "micros", "replicas", "zero", "eager", "in_flight"), GRID)
def test_training(ranks, on_twin, schedule, pp, micros, replicas, zero, eager, in_flight):
    """Losses, norms and evaluation of two steps are those on gloo, but for the order in which it adds up."""
    given = {
        "config": training.settings(micros, replicas, zero, schedule=schedule),
        "ranks": pp,
        "replicas": replicas,
        "steps": 2,
    }
    world = pp * replicas
    strict = on_twin(world, strict_runs.train, eager, in_flight, seed=pp, **given)
    gloo = ranks.run(world, strict_runs.train, **given)
    for mine, theirs in zip(strict, gloo, strict=True):
        assert mine["class"] == theirs["class"] == "DualPipeEngine"
        for key in ("losses", "norms", "eval_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
def test_eight_ranks(on_twin, eager):
    config = training.settings(9, schedule="dualpipe")
    found = on_twin(8, strict_runs.train, eager, config=config, ranks=8, steps=1, blocks=8)
    assert {each["class"] for each in found} == {"DualPipeEngine"}
    assert len({each["losses"][0] for each in found}) == 1


def test_groups_do_not_grow(on_twin):
    """Neither with steps nor with layers; an engine that ends gives its own back."""
    few, many = (on_twin(2, strict_runs.engine_groups, steps=2, blocks=blocks) for blocks in (2, 6))
    assert few == many
    for counts, edges, left in few:
        assert len(set(counts)) == 1
        assert edges == 2
        assert left == counts[0] - edges


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "shared experts"])
def test_auto(on_twin, tmp_path, experts):
    """Its measurement leaves no group behind."""
    for left, losses in on_twin(4 if experts else 2, strict_runs.auto, folder=str(tmp_path), experts=experts):
        assert left == 0
        assert len(losses) == 2


def test_shared_experts_and_checkpoints(on_twin, tmp_path):
    """Two replicas share experts; the state saved and loaded trains on bit for bit."""
    settings = training.settings(3, 2, zero=1, schedule="dualpipe")
    given = {"model": {}, "settings": settings, "ranks": 2, "folder": str(tmp_path), "steps": 1}
    for each in on_twin(4, strict_runs.moe, **given):
        assert each["same"]
        assert each["resumed"] == each["losses"][1:]


def test_deepseek(on_twin):
    """Two pipelines of DeepSeek's interface beside each other, each in a process group of its own."""
    for losses_are_equal, error in on_twin(4, strict_runs.deepseek):
        assert losses_are_equal
        assert error < 1e-12
