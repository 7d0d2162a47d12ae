"""The engine on gloo processes against stock DeepSpeed 1F1B and against one process."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import training
from pairwise import pairwise

FACTORS = {
    "schedule": ["dualpipe", "1f1b", "zb1p", "dualpipev", "zbv"],
    "pp": [4, 2, 6, 8],
    "micros": [3, 8, 1, 11, 20],
    "replicas": [1, 2],
    "zero": [1, 0],
    "tied": [True, False],
    "checkpointed": [False, True],
    "split_backward": ["auto", False],
    "optimize": [True, False],
}


def runs_here(row):
    """At most 8 processes, and those with few micro-batches, since they take the longest."""
    return row["pp"] * row["replicas"] <= 8 and (row["pp"] < 6 or row["micros"] < 20)


PAIRWISE = pairwise(FACTORS, runs_here)
WHOLE = list(product(FACTORS["schedule"], [(2, 1), (2, 4), (4, 3), (4, 8), (4, 11), (4, 20), (6, 12), (8, 16)]))


@pytest.fixture(scope="module")
def stock(ranks):
    """Stock DeepSpeed's runs, each made once."""
    runs = {}

    def run(pp, micros, replicas=1, zero=1, precision="fp32", clip=1.0, **kwargs):
        key = (pp, micros, replicas, zero, precision, clip, str(kwargs))
        if key not in runs:
            config = training.settings(micros, replicas, zero, precision, clip=clip)
            runs[key] = ranks.run(pp * replicas, training.train, config=config, ranks=pp, replicas=replicas, **kwargs)
            assert runs[key][0]["class"] == "PipelineEngine"
        return runs[key]

    return run


def run_ours(ranks, schedule, pp, micros, replicas=1, zero=1, precision="fp32", clip=1.0, pipeline=None, **kwargs):
    config = training.settings(micros, replicas, zero, precision, schedule, clip=clip, **(pipeline or {}))
    found = ranks.run(pp * replicas, training.train, config=config, ranks=pp, replicas=replicas, **kwargs)
    assert {rank["class"] for rank in found} == {"DualPipeEngine"}
    return found


def assert_same_training(ours, stock, tolerance=1e-5):
    assert len({tuple(rank["losses"]) for rank in ours}) == 1, "the loss is the same number on every rank"
    for key in ("losses", "norms"):
        assert ours[0][key] == pytest.approx(stock[0][key], rel=tolerance)
    assert ours[0]["lr"] == stock[0]["lr"]
    assert ours[0]["samples"] == stock[0]["samples"]
    assert ours[0]["eval_loss"] == pytest.approx(stock[0]["eval_loss"], rel=tolerance)
    expected = {name: value for rank in stock for name, value in rank["weights"].items()}
    assert {name for rank in ours for name in rank["weights"]} == expected.keys()
    for rank in ours:
        for name, value in rank["weights"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert_copies_identical(ours)


def assert_copies_identical(ours):
    for step in range(len(ours[0]["digests"])):
        seen = {}
        for rank in ours:
            for name, value in rank["digests"][step].items():
                assert seen.setdefault(name, value) == value, f"copies of {name} differ after step {step}"


def name_of(case):
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", PAIRWISE, ids=name_of)
def test_trains_like_stock(ranks, stock, case):
    """Stock fp32 without ZeRO clips by the norm of stage 0 only, so the oracle is always stock under ZeRO-1."""
    shape = {key: case[key] for key in ("pp", "micros", "replicas", "tied")}
    if case["checkpointed"]:
        shape["module_kwargs"] = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
    pipeline = {key: case[key] for key in ("split_backward", "optimize")}
    ours = run_ours(ranks, case["schedule"], zero=case["zero"], pipeline=pipeline, **shape)
    assert_same_training(ours, stock(**shape))


@pytest.mark.all
@pytest.mark.parametrize(("schedule", "shape"), WHOLE)
def test_every_shape_trains_like_stock(ranks, stock, schedule, shape):
    assert_same_training(run_ours(ranks, schedule, *shape, steps=6), stock(*shape, steps=6))


def test_plan_file(ranks, stock, tmp_path):
    from dualpipe_engine.schedule.search.make_plan import make_plan

    path = tmp_path / "plan.csv"
    path.write_text(make_plan("dualpipe", 4, 8).to_csv())
    assert_same_training(run_ours(ranks, str(path), 4, 8), stock(4, 8))


def test_without_clipping_zero_0_equals_stock(ranks, stock):
    ours = run_ours(ranks, "dualpipe", 4, 8, zero=0, clip=0.0)
    theirs = stock(4, 8, zero=0, clip=0.0)
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], rel=1e-5)
    assert_copies_identical(ours)


@pytest.mark.parametrize(("micros", "zero"), [(8, 1), (11, 0)])
def test_bf16_follows_stock(ranks, stock, micros, zero):
    ours = run_ours(ranks, "dualpipe", 4, micros, zero=zero, precision="bf16")
    theirs = stock(4, micros, zero=zero, precision="bf16")
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], rel=0.03)
    # Norms fall to a tenth within the 20 steps; bf16 rounds what is left by as much as before.
    norms = theirs[0]["norms"]
    assert ours[0]["norms"] == pytest.approx(norms, rel=0.05, abs=0.01 * max(norms))
    assert_copies_identical(ours)


@pytest.mark.parametrize("zero", [0, 1])
def test_predivided_gradients_are_the_same(ranks, zero):
    config = training.settings(3, 2, zero, schedule="dualpipe")
    plain, divided = (
        ranks.run(4, training.train, config=config | more, ranks=2, replicas=2)
        for more in ({}, {"gradient_predivide_factor": 3.0})
    )
    assert_same_training(divided, plain)


def test_zero_1_partitions_over_both_copies(ranks, stock):
    ours = run_ours(ranks, "dualpipe", 4, 8, steps=1, tied=False)
    theirs = stock(4, 8, steps=1, tied=False)
    total = sum(rank["optimizer_bytes"] for rank in theirs)
    assert sum(rank["optimizer_bytes"] for rank in ours) <= 1.01 * total
    largest = max(rank["optimizer_bytes"] for rank in theirs)
    assert max(rank["optimizer_bytes"] for rank in ours) <= 1.01 * largest


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p"])
@pytest.mark.parametrize(("pp", "micros"), [(2, 1), (4, 3), (4, 8)])
def test_float64_gradients_equal_one_process(ranks, schedule, pp, micros):
    config = training.settings(micros, zero=0, schedule=schedule)
    found = ranks.run(pp, training.gradients, config=config, ranks=pp, micros=micros)
    start = {name: value for rank in found for name, value in rank["start"].items()}
    oracle = ranks.run(1, training.sequential_gradients, ranks=pp, micros=micros, start=start)[0]
    assert found[0]["loss"] == pytest.approx(oracle["loss"], rel=1e-6)  # the loss is reported in fp32
    copies = {}
    for rank in found:
        for name, grad in rank["grads"].items():
            copies.setdefault(name, []).append(grad)
    assert copies.keys() == oracle["grads"].keys()
    for name, grads in copies.items():
        for grad in grads:
            torch.testing.assert_close(grad, oracle["grads"][name], rtol=1e-10, atol=1e-12)


def test_every_rank_defers_its_matrices(ranks):
    config = training.settings(8, zero=0, schedule="dualpipe", optimize=False)  # with I and W on every rank
    found = ranks.run(4, training.gradients, config=config, ranks=4, micros=8)
    assert all(rank["share"] > 0.6 for rank in found)
    assert all(math.isfinite(rank["loss"]) for rank in found)
