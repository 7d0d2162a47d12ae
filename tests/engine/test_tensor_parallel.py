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
    cases["dualpipe"]["micros"] = 8
    cases["reentrant"] = {"schedule": "dualpipe", "reentrant": True, **FOUR}
    cases["not reentrant"] = {"schedule": "dualpipe", "reentrant": False, **FOUR}
    cases["four slices"] = {"schedule": "dualpipev", "ranks": 1, "slices": 4}
    found = ranks.run(4, tensor_parallel_runs.many, cases=cases)
    check(found)
    assert all(rank["dualpipe"]["share"] > 0.6 for rank in found), "sliced matrices are left to W"


@pytest.mark.all
@pytest.mark.parametrize(
    "case",
    [
        {"schedule": "dualpipe", "replicas": 2, **FOUR},
        {"schedule": "dualpipe", "ranks": 4, "slices": 2, "micros": 5},
    ],
    ids=["2 x 2 x 2", "4 x 2"],
)
def test_float64_gradients_on_eight_ranks(ranks, case):
    check(ranks.run(8, tensor_parallel_runs.many, cases={"": case}))


TRAINED = (("dualpipe", 0), ("dualpipe", 1), ("dualpipe", 2), ("zb1p", 1))
HALVES = (
    ("bf16", None, 1),
    ("bf16", "dualpipe", 1),
    ("bf16", "dualpipe", 2),
    ("fp16", None, 1),
    ("fp16", "dualpipe", 0),
)
OVERFLOWS = ((0, 3), (1, 0), (2, 3))


@pytest.fixture(scope="module")
def trained(ranks):
    """Runs of ours and of stock DeepSpeed (schedule None), rank by rank; clipping is at work in those of fp32."""
    cases = {
        ("fp32", schedule, zero): {"config": training.settings(4, zero=zero, clip=0.1, schedule=schedule), "steps": 3}
        for schedule, zero in ((None, 1), *TRAINED)
    }
    for zero, poisoned in OVERFLOWS:
        config = training.settings(4, zero=zero, precision="fp16", schedule="dualpipe")
        config["fp16"]["hysteresis"] = 1
        del config["scheduler"]
        cases["overflow", zero, poisoned] = {"config": config, "poisoned": (1, poisoned), "steps": 4}
    for precision, schedule, zero in HALVES:
        config = training.settings(4, zero=zero, precision=precision, schedule=schedule)
        cases[precision, schedule, zero] = {"config": config, "steps": 3}
    cases = {name: case | FOUR for name, case in cases.items()}
    found = ranks.run(4, training.each, call=tensor_parallel_runs.train, cases=cases)
    return lambda *name: [rank[name] for rank in found]


@pytest.mark.parametrize(("schedule", "zero"), TRAINED)
def test_trains_like_stock(trained, schedule, zero):
    stock, found = trained("fp32", None, 1), trained("fp32", schedule, zero)
    assert stock[0]["class"] == "PipelineEngine"
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


@pytest.mark.parametrize(("zero", "poisoned"), OVERFLOWS)
def test_overflow_in_one_slice_skips_the_step_on_all(trained, zero, poisoned):
    for rank in trained("overflow", zero, poisoned):
        assert rank["skipped"] == [0, 1, 1, 1]
        assert rank["digests"][1] == rank["digests"][0] != rank["digests"][2] != rank["digests"][3]


@pytest.mark.parametrize(("precision", "zero"), [("bf16", 1), ("bf16", 2), ("fp16", 0)])
def test_half_precision_follows_stock(trained, precision, zero):
    theirs, ours = trained(precision, None, 1), trained(precision, "dualpipe", zero)
    steps = 1 if precision == "fp16" else 3  # without ZeRO DeepSpeed's fp16 counts a step of Adam before the first one
    assert ours[0]["losses"][:steps] == pytest.approx(theirs[0]["losses"][:steps], rel=0.02)
    assert ours[0]["norms"][:steps] == pytest.approx(theirs[0]["norms"][:steps], rel=0.05)
