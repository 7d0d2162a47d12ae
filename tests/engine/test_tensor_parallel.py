"""Column- and row-parallel layers on a PipeModelDataParallelTopology, against one process and stock DeepSpeed."""

from __future__ import annotations

import pytest
import tensor_parallel_runs
import torch
import training

FOUR = {"ranks": 2, "slices": 2}


def check(found):
    for rank in found:
        for name, case in rank.items():
            assert case["loss"] < 1e-6, name  # the loss is reported in fp32
            assert case["worst"] < 1e-10, name
            assert not case["odd"], name


def test_float64_gradients_equal_one_process(ranks):
    cases = {name: {"schedule": name, **FOUR} for name in ("dualpipe", "dualpipev", "zb1p", "1f1b")}
    cases["eight"] = {"schedule": "dualpipe", "micros": 8, **FOUR}
    cases["reentrant"] = {"schedule": "dualpipe", "reentrant": True, **FOUR}
    cases["not reentrant"] = {"schedule": "dualpipe", "reentrant": False, **FOUR}
    cases["four slices"] = {"schedule": "dualpipev", "ranks": 1, "slices": 4}
    found = ranks.run(4, tensor_parallel_runs.many, cases=cases)
    check(found)
    assert all(rank["dualpipe"]["share"] > 0.6 for rank in found), "sliced matrices are left to W"


def test_float64_gradients_on_eight_ranks(ranks):
    cases = {
        "2 x 2 x 2": {"schedule": "dualpipe", "replicas": 2, **FOUR},
        "4 x 2": {"schedule": "dualpipe", "ranks": 4, "slices": 2, "micros": 5},
    }
    check(ranks.run(8, tensor_parallel_runs.many, cases=cases))


@pytest.fixture(scope="module")
def stock(ranks):
    """Four steps of DeepSpeed's own engine; clipping is at work in each."""
    config = training.settings(4, zero=1, clip=0.1)
    found = ranks.run(4, tensor_parallel_runs.train, config=config, **FOUR)
    assert found[0]["class"] == "PipelineEngine"
    return found


@pytest.mark.parametrize(("schedule", "zero"), [("dualpipe", 0), ("dualpipe", 1), ("dualpipe", 2), ("zb1p", 1)])
def test_trains_like_stock(ranks, stock, schedule, zero):
    config = training.settings(4, zero=zero, clip=0.1, schedule=schedule)
    found = ranks.run(4, tensor_parallel_runs.train, config=config, **FOUR)
    expected = {(rank["slice"], name): value for rank in stock for name, value in rank["weights"].items()}
    for rank in found:
        assert rank["class"] == "DualPipeEngine"
        for key in ("losses", "norms", "eval"):
            assert rank[key] == pytest.approx(stock[0][key], rel=1e-5), key
        for name, value in rank["weights"].items():
            torch.testing.assert_close(value, expected[rank["slice"], name], rtol=1e-4, atol=1e-5)
    assert min(found[0]["norms"]) > 0.1


def test_slices_of_different_sizes(ranks):
    """Parameters and arguments of layers are compared with those of copies, which other slices are not."""
    cases = {"uneven": {"schedule": "dualpipe", "shares": [24, 8], "named": True, **FOUR}}
    check(ranks.run(4, tensor_parallel_runs.many, cases=cases))


@pytest.mark.parametrize(("zero", "poisoned"), [(0, 3), (1, 0), (2, 3)])
def test_overflow_in_one_slice_skips_the_step_on_all(ranks, zero, poisoned):
    config = training.settings(4, zero=zero, precision="fp16", schedule="dualpipe")
    config["fp16"]["hysteresis"] = 1
    del config["scheduler"]
    found = ranks.run(4, tensor_parallel_runs.train, config=config, poisoned=(1, poisoned), **FOUR)
    for rank in found:
        assert rank["skipped"] == [0, 1, 1, 1]
        assert rank["digests"][1] == rank["digests"][0] != rank["digests"][2] != rank["digests"][3]


def test_bf16_follows_stock(ranks):
    theirs = ranks.run(4, tensor_parallel_runs.train, config=training.settings(4, precision="bf16"), **FOUR)
    for zero in (1, 2):
        config = training.settings(4, zero=zero, precision="bf16", schedule="dualpipe")
        ours = ranks.run(4, tensor_parallel_runs.train, config=config, **FOUR)
        assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], rel=0.02)
        assert ours[0]["norms"] == pytest.approx(theirs[0]["norms"], rel=0.05)
