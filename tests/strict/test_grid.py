"""The engine on the strict twin of NCCL: the parity grid, experts, `auto` and checkpoints, lazy and eager."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import strict_runs

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
import test_moe
import test_parity
import training
from pairwise import pairwise

# schedule, pipeline ranks, micro-batches, replicas, ZeRO stage, eager groups, operations in flight
SAMPLE = [
    ("dualpipe", 4, 5, 1, 1, True, 8),
    ("dualpipev", 3, 5, 1, 0, False, 3),
    pytest.param("zb1p", 2, 4, 2, 2, True, 3, marks=pytest.mark.all),
]
FACTORS = test_parity.FACTORS | {
    "pp": [4, 2, 3, 8],
    "micros": [3, 1, 5, 8],
    "zero": [1, 0, 2],
    "eager": [True, False],
    "in_flight": [8, 3],
}


def runs_here(row):
    return row["pp"] * row["replicas"] <= 8 and (row["schedule"] != "dualpipe" or row["pp"] % 2 == 0)


GRID = pairwise(FACTORS, runs_here)


def check(ranks, on_twin, pp, eager, in_flight, config, replicas=1, **kwargs):
    """Losses, norms and evaluation of two steps are those on gloo, but for the order in which it adds up."""
    given = {"config": config, "ranks": pp, "replicas": replicas, "steps": 2, **kwargs}
    strict = on_twin(pp * replicas, strict_runs.train, eager, in_flight, seed=pp, **given)
    gloo = ranks.run(pp * replicas, strict_runs.train, **given)
    for mine, theirs in zip(strict, gloo, strict=True):
        assert mine["class"] == theirs["class"] == "DualPipeEngine"
        for key in ("losses", "norms", "eval_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5)


@pytest.mark.parametrize(("schedule", "pp", "micros", "replicas", "zero", "eager", "in_flight"), SAMPLE)
def test_training(ranks, on_twin, schedule, pp, micros, replicas, zero, eager, in_flight):
    config = training.settings(micros, replicas, zero, schedule=schedule)
    check(ranks, on_twin, pp, eager, in_flight, config, replicas)


@pytest.mark.all
@pytest.mark.parametrize("case", GRID, ids=test_parity.name_of)
def test_grid(ranks, on_twin, case):
    pipeline = {key: case[key] for key in ("split_backward", "optimize")}
    given = {key: case[key] for key in ("pp", "eager", "in_flight", "replicas", "tied")}
    if case["checkpointed"]:
        given["module_kwargs"] = test_parity.RECOMPUTED
    config = training.settings(case["micros"], case["replicas"], case["zero"], schedule=case["schedule"], **pipeline)
    check(ranks, on_twin, config=config, **given)


@pytest.mark.all
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
def test_eight_ranks(on_twin, eager):
    config = training.settings(5, schedule="dualpipe")
    found = on_twin(8, strict_runs.train, eager, 3, config=config, ranks=8, steps=1, blocks=8)
    assert {each["class"] for each in found} == {"DualPipeEngine"}
    assert len({each["losses"][0] for each in found}) == 1


def test_stages_that_pass_on_several_tensors(ranks, on_twin):
    """With as few operations in flight as one tensor needs."""
    given = {"config": training.settings(6, schedule="dualpipe"), "ranks": 4}
    strict = on_twin(4, strict_runs.several_tensors, in_flight=3, **given)
    assert strict == ranks.run(4, strict_runs.several_tensors, **given)


@pytest.mark.parametrize(
    ("schedule", "pp", "eager"),
    [
        ("dualpipe", 4, True),
        *(pytest.param(*each, False, marks=pytest.mark.all) for each in (("zbv", 3), ("interleaved", 4), ("zb1p", 4))),
    ],
)
def test_shapes_that_change(ranks, on_twin, schedule, pp, eager):
    """With the operations in flight that CUDA allows by default."""
    given = {"config": training.settings(7, schedule=schedule), "ranks": pp, "lengths": (2, 5, 1)}
    strict = on_twin(pp, strict_runs.several_tensors, eager, in_flight=8, **given)
    assert strict == ranks.run(pp, strict_runs.several_tensors, **given)


def test_groups_do_not_grow(on_twin):
    """Neither with steps nor with layers; an engine that ends gives its own back."""
    few, many = (on_twin(2, strict_runs.engine_groups, steps=2, blocks=blocks) for blocks in (2, 6))
    assert few == many
    for counts, edges, left in few:
        assert len(set(counts)) == 1
        assert edges == 2
        assert left == 0


@pytest.mark.all
@pytest.mark.parametrize(
    ("pp", "experts", "eager"),
    [(2, False, True), (3, False, False), (4, False, True), (8, False, False), (2, True, True), (3, True, False)],
)
def test_auto(on_twin, tmp_path, pp, experts, eager):
    """Its measurement leaves no group behind."""
    world = 2 * pp if experts else pp
    for left, losses in on_twin(world, strict_runs.auto, eager, folder=str(tmp_path), experts=experts, ranks=pp):
        assert left == 0
        assert len(losses) == 2


EXPERTS = [  # schedule, pipeline ranks, micro-batches, ZeRO stage, eager groups, operations in flight
    ("dualpipe", 2, 3, 1, True, 8),
    pytest.param("dualpipe", 4, 5, 2, False, 3, marks=pytest.mark.all),
    pytest.param("dualpipev", 2, 3, 1, False, 3, marks=pytest.mark.all),
    pytest.param("zbv", 2, 4, 2, True, 3, marks=pytest.mark.all),
    pytest.param("zb1p", 2, 3, 2, False, 8, marks=pytest.mark.all),
    pytest.param("1f1b", 3, 1, 1, True, 3, marks=pytest.mark.all),
]


@pytest.mark.parametrize(("schedule", "pp", "micros", "zero", "eager", "in_flight"), EXPERTS)
def test_shared_experts_and_checkpoints(on_twin, tmp_path, schedule, pp, micros, zero, eager, in_flight):
    """Two replicas share experts; the state saved and loaded trains on bit for bit."""
    settings = training.settings(micros, 2, zero=zero, schedule=schedule)
    given = {"model": {"blocks": 2 * pp}, "settings": settings, "ranks": pp, "folder": str(tmp_path), "steps": 1}
    for each in on_twin(2 * pp, strict_runs.moe, eager, in_flight, **given):
        assert each["same"]
        assert each["counts_apart"]
        assert each["resumed"] == each["losses"][1:]


@pytest.mark.all
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
def test_gradients_of_shared_experts(on_twin, eager):
    """Of every case of the engine's own test they are those of one process."""
    cases = list(test_moe.CASES.values())
    found = on_twin(4, strict_runs.moe_gradients, eager, 3, cases=cases, ranks=2)
    for index, case in enumerate(cases):
        test_moe.check([rank[index] for rank in found], case)


@pytest.mark.all
@pytest.mark.parametrize(
    ("schedule", "pp", "zero", "precision", "eager"),
    [("dualpipe", 4, 1, "bf16", False), ("dualpipev", 3, 2, "fp32", True), ("dualpipe", 8, 2, "bf16", True)],
)
def test_a_resumed_run_is_the_uninterrupted_one(on_twin, tmp_path, schedule, pp, zero, precision, eager):
    config = training.settings(3, zero=zero, precision=precision, schedule=schedule)
    given = {"config": config, "ranks": pp, "folder": str(tmp_path), "steps": 3}
    whole = on_twin(pp, strict_runs.train_from, eager, save_at=(2,), **given)
    resumed = on_twin(pp, strict_runs.train_from, eager, load=True, **given)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert mine["losses"] == theirs["losses"][2:]
        assert mine["digests"] == theirs["digests"]


def test_deepseek(on_twin):
    """Two pipelines of DeepSeek's interface beside each other, each in a process group of its own."""
    for losses_are_equal, error in on_twin(4, strict_runs.deepseek):
        assert losses_are_equal
        assert error < 1e-12
