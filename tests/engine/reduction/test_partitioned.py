"""ZeRO-1 and ZeRO-2 of the engine against stock DeepSpeed under ZeRO-1."""

from __future__ import annotations

import itertools

import pytest
import torch
import training
import zero_runs

STEPS = 6


@pytest.fixture(scope="module")
def stock(ranks):
    runs = {}

    def run(pp, micros, replicas=1, precision="fp32", **kwargs):
        key = (pp, micros, replicas, precision, str(kwargs))
        if key not in runs:
            config = training.settings(micros, replicas, 1, precision)
            runs[key] = ranks.run(
                pp * replicas, training.train, config=config, ranks=pp, replicas=replicas, steps=STEPS, **kwargs
            )
        return runs[key]

    return run


def run_zero_2(ranks, schedule, pp, micros, replicas=1, precision="fp32", **kwargs):
    config = training.settings(micros, replicas, 2, precision, schedule)
    return ranks.run(pp * replicas, training.train, config=config, ranks=pp, replicas=replicas, steps=STEPS, **kwargs)


def assert_same(ours, theirs, rel=1e-5, rtol=1e-4, atol=1e-5):
    for key in ("losses", "norms"):
        assert ours[0][key] == pytest.approx(theirs[0][key], rel=rel)
    expected = {name: value for rank in theirs for name, value in rank["weights"].items()}
    for rank in ours:
        for name, value in rank["weights"].items():
            torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol)
    assert_copies_identical(ours)


def assert_copies_identical(ours):
    for step in range(len(ours[0]["digests"])):
        seen = {}
        for rank in ours:
            for name, value in rank["digests"][step].items():
                assert seen.setdefault(name, value) == value, f"copies of {name} differ after step {step}"


@pytest.mark.parametrize(("pp", "micros"), [(2, 1), (4, 3), (4, 8), (4, 11)])
def test_zero_2_trains_like_stock_zero_1(ranks, stock, pp, micros):
    assert_same(run_zero_2(ranks, "dualpipe", pp, micros), stock(pp, micros))


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_zero_2_on_other_placements_and_ties_across_ranks(ranks, stock, schedule):
    assert_same(run_zero_2(ranks, schedule, 4, 3), stock(4, 3))


@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_zero_2_with_replicas(ranks, stock, schedule):
    assert_same(run_zero_2(ranks, schedule, 2, 3, replicas=2), stock(2, 3, replicas=2))


def test_zero_2_in_bf16_follows_stock(ranks, stock):
    ours, theirs = (
        run(4, 8, precision="bf16") for run in (lambda *a, **k: run_zero_2(ranks, "dualpipe", *a, **k), stock)
    )
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], rel=0.02)
    assert_copies_identical(ours)


@pytest.mark.parametrize("micros", [3, 8])
def test_zero_2_keeps_no_gradient_of_a_stage(ranks, micros):
    """After each B and W the stage's gradients are gone; ZeRO-1 holds them until the stage is done."""
    found = {
        zero: ranks.run(4, zero_runs.watched, config=training.settings(micros, 1, zero, "fp32", "dualpipe"), ranks=4)
        for zero in (1, 2)
    }
    assert found[1][0]["losses"] == pytest.approx(found[2][0]["losses"], rel=1e-5)
    for rank in found[2]:
        assert rank["held"] == {"accumulate": 0, "reduce": 0}
    for rank in found[1]:
        assert rank["held"]["reduce"] == 0
        assert rank["held"]["accumulate"] > 0


@pytest.mark.parametrize(
    ("schedule", "zero", "rank"),
    [
        ("dualpipe", 0, 2),
        ("dualpipe", 1, 2),
        ("dualpipe", 2, 2),
        ("dualpipe", 1, 0),
        ("dualpipev", 0, 1),
        ("zb1p", 1, 3),
        ("1f1b", 2, 0),
    ],
)
def test_overflow_on_one_rank_skips_the_step_on_all(ranks, schedule, zero, rank):
    config = training.settings(4, 1, zero, "fp16", schedule)
    config["fp16"]["hysteresis"] = 1
    found = ranks.run(4, zero_runs.half, config=config, ranks=4, steps=4, poisoned=(1, rank))
    for each in found:
        assert each["dtypes"] == {"torch.float16"}
        assert each["skipped"] == [0, 1, 1, 1]
        assert each["scales"] == [256, 128, 128, 128]
        assert each["digests"][1] == each["digests"][0] != each["digests"][3]
    assert zero_runs.finite(found)
    assert_copies_identical(found)


@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_dynamic_loss_scale(ranks, schedule):
    """From a scale at which everything overflows down to one that works, and up again; the same on all ranks."""
    config = training.settings(4, 1, 1, "fp16", schedule)
    config["fp16"] |= {"initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 2}
    found = ranks.run(4, zero_runs.half, config=config, ranks=4, steps=8)
    scales, skipped = [2.0**18, *found[0]["scales"]], [0, *found[0]["skipped"]]
    assert all(rank["scales"] == scales[1:] and rank["skipped"] == skipped[1:] for rank in found)
    for step in range(8):
        factor = scales[step + 1] / scales[step]
        assert factor == 0.5 if skipped[step + 1] > skipped[step] else factor in (1, 2)
    assert scales[1] == 2.0**17
    assert any(later > before for before, later in itertools.pairwise(scales))
    assert zero_runs.finite(found)


@pytest.mark.parametrize("zero", [1, 2])
def test_fp16_follows_stock(ranks, zero):
    theirs = ranks.run(4, zero_runs.stock_half, config=training.settings(8, 1, 1, "fp16"), ranks=4, steps=STEPS)
    ours = ranks.run(4, zero_runs.half, config=training.settings(8, 1, zero, "fp16", "dualpipe"), ranks=4, steps=STEPS)
    assert ours[0]["skipped"][-1] == 0
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], rel=0.01)


def offloaded(config):
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config | {"zero_force_ds_cpu_optimizer": False}


@pytest.mark.parametrize(("zero", "schedule", "micros"), [(1, "dualpipe", 8), (2, "dualpipe", 3), (1, "zb1p", 3)])
def test_optimizer_on_the_host_trains_like_stock(ranks, stock, zero, schedule, micros):
    config = offloaded(training.settings(micros, 1, zero, "fp32", schedule))
    ours = ranks.run(4, training.train, config=config, ranks=4, steps=STEPS)
    assert all(rank["offloaded"] for rank in ours)
    assert_same(ours, stock(4, micros))


@pytest.mark.parametrize("zero", [1, 2])
def test_overflow_with_the_optimizer_on_the_host(ranks, zero):
    config = offloaded(training.settings(4, 1, zero, "fp16", "dualpipe"))
    config["fp16"]["hysteresis"] = 1
    found = ranks.run(4, zero_runs.half, config=config, ranks=4, steps=4, poisoned=(1, 2))
    for rank in found:
        assert rank["skipped"] == [0, 1, 1, 1]
        assert rank["digests"][1] == rank["digests"][0] != rank["digests"][3]
    assert_copies_identical(found)


def test_bf16_with_the_optimizer_on_the_host(ranks, stock):
    ours = ranks.run(
        4, training.train, config=offloaded(training.settings(8, 1, 1, "bf16", "dualpipe")), ranks=4, steps=STEPS
    )
    theirs = stock(4, 8, precision="bf16")
    assert ours[0]["losses"] == pytest.approx(theirs[0]["losses"], rel=0.02)
    assert ours[0]["norms"] == pytest.approx(theirs[0]["norms"], rel=0.03)
