"""ZeRO-1 and ZeRO-2 of the engine against stock DeepSpeed under ZeRO-1."""

from __future__ import annotations

import itertools

import pytest
import torch
import training
import zero_runs

STEPS = 3


def offloaded(config):
    config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config | {"zero_force_ds_cpu_optimizer": False}


#: name -> schedule, pipeline ranks, micro-batches, replicas, ZeRO stage, precision, optimizer on the host or not
TRAINED = {
    "2 ranks, 1 micro-batch": ("dualpipe", 2, 1, 1, 2, "fp32", False),
    "3 micro-batches": ("dualpipe", 4, 3, 1, 2, "fp32", False),
    "8 micro-batches": ("dualpipe", 4, 8, 1, 2, "fp32", False),
    "11 micro-batches": ("dualpipe", 4, 11, 1, 2, "fp32", False),
    "tied across ranks": ("1f1b", 4, 3, 1, 2, "fp32", False),
    "dualpipev": ("dualpipev", 4, 3, 1, 2, "fp32", False),
    "replicas": ("dualpipe", 2, 3, 2, 2, "fp32", False),
    "replicas of zb1p": ("zb1p", 2, 3, 2, 2, "fp32", False),
    "bf16": ("dualpipe", 4, 8, 1, 2, "bf16", False),
    "optimizer on the host, ZeRO-1": ("dualpipe", 4, 8, 1, 1, "fp32", True),
    "optimizer on the host, ZeRO-2": ("dualpipe", 4, 3, 1, 2, "fp32", True),
    "optimizer on the host, zb1p": ("zb1p", 4, 3, 1, 1, "fp32", True),
    "optimizer on the host, bf16": ("dualpipe", 4, 8, 1, 1, "bf16", True),
}
#: name -> schedule, ZeRO stage, rank with an overflow, whether the optimizer is on the host
OVERFLOWS = {
    "dualpipe, ZeRO-0": ("dualpipe", 0, 2, False),
    "dualpipe, ZeRO-1": ("dualpipe", 1, 2, False),
    "dualpipe, ZeRO-2": ("dualpipe", 2, 2, False),
    "at the end": ("dualpipe", 1, 0, False),
    "dualpipev": ("dualpipev", 0, 1, False),
    "zb1p": ("zb1p", 1, 3, False),
    "1f1b": ("1f1b", 2, 0, False),
    "optimizer on the host, ZeRO-1": ("dualpipe", 1, 2, True),
    "optimizer on the host, ZeRO-2": ("dualpipe", 2, 2, True),
}
LIKE_STOCK = [("dualpipe", 0), ("dualpipe", 1), ("dualpipe", 2), ("1f1b", 0)]  #: the last has tied weights on two ranks


def ours_of(schedule, pp, micros, replicas, zero, precision, host):
    config = training.settings(micros, replicas, zero, precision, schedule)
    return {"config": offloaded(config) if host else config, "ranks": pp, "replicas": replicas, "steps": STEPS}


def stock_of(schedule, pp, micros, replicas, zero, precision, host):
    """Stock DeepSpeed under ZeRO-1 with all stages on one rank, the same for several of ours."""
    config = training.settings(micros, replicas, 1, precision)
    given = {"config": config, "ranks": 1, "replicas": replicas, "blocks": 2 * pp, "steps": STEPS}
    return (pp, micros, precision), given


@pytest.fixture(scope="module")
def trained(ranks):
    """Ours and stock's; what has as many ranks shares a start."""
    runs = {}

    def run(world, cases):
        key = (world, *cases)
        if key not in runs:
            runs[key] = ranks.run(world, training.each, call=training.train, cases=cases)
        return runs[key]

    def of(name):
        _, pp, _, replicas, *_ = case = TRAINED[name]
        alike = {n: ours_of(*c) for n, c in TRAINED.items() if c[1] * c[3] == pp * replicas}
        references = dict(stock_of(*c) for c in TRAINED.values() if c[3] == replicas)
        key, _ = stock_of(*case)
        return [rank[name] for rank in run(pp * replicas, alike)], [rank[key] for rank in run(replicas, references)]

    return of


def by_sgd(config):
    """Without ZeRO DeepSpeed's fp16 counts a step of Adam before the first one."""
    return config | {"optimizer": {"type": "SGD", "params": {"lr": 0.01}}, "zero_allow_untested_optimizer": True}


@pytest.fixture(scope="module")
def halves(ranks):
    """Runs in fp16 by name, rank by rank."""
    cases = {}
    for name, (schedule, zero, rank, host) in OVERFLOWS.items():
        config = training.settings(4, 1, zero, "fp16", schedule)
        config["fp16"]["hysteresis"] = 1
        config = offloaded(config) if host else config
        cases[name] = {"config": config, "ranks": 4, "steps": 4, "poisoned": (1, rank)}
    for schedule in ("dualpipe", "zb1p"):
        config = training.settings(4, 1, 1, "fp16", schedule)
        config["fp16"] |= {"initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 2}
        cases["scale", schedule] = {"config": config, "ranks": 4, "steps": 8}
    for schedule, zero in LIKE_STOCK:
        config = by_sgd(training.settings(8, 1, zero, "fp16", schedule))
        cases["like stock", schedule, zero] = {"config": config, "ranks": 4, "steps": STEPS, "tied": True}
    found = ranks.run(4, training.each, call=zero_runs.half, cases=cases)
    return lambda name: [rank[name] for rank in found]


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


def like_stock(trained, name):
    ours, stock = trained(name)
    assert_same(ours, stock)
    assert {rank["class"] for rank in stock} == {"PipelineEngine"}
    assert all(rank["offloaded"] == TRAINED[name][-1] for rank in ours)


@pytest.mark.parametrize("name", [name for name, (*_, kind, host) in TRAINED.items() if kind == "fp32" and not host])
def test_zero_2_trains_like_stock_zero_1(trained, name):
    like_stock(trained, name)


@pytest.mark.parametrize("name", [name for name, (*_, kind, host) in TRAINED.items() if kind == "fp32" and host])
def test_optimizer_on_the_host_trains_like_stock(trained, name):
    like_stock(trained, name)


@pytest.mark.parametrize("name", [name for name, case in TRAINED.items() if case[5] == "bf16"])
def test_bf16_follows_stock(trained, name):
    ours, stock = trained(name)
    assert ours[0]["losses"] == pytest.approx(stock[0]["losses"], rel=0.02)
    assert ours[0]["norms"] == pytest.approx(stock[0]["norms"], rel=0.03)
    assert_copies_identical(ours)


def test_zero_2_keeps_no_gradient_of_a_stage(ranks):
    """After each B and W the stage's gradients are gone; ZeRO-1 holds them until the stage is done."""
    cases = {
        (zero, micros): {"config": training.settings(micros, 1, zero, "fp32", "dualpipe"), "ranks": 4}
        for zero in (1, 2)
        for micros in (3, 8)
    }
    for rank in ranks.run(4, training.each, call=zero_runs.watched, cases=cases):
        for micros in (3, 8):
            one, two = rank[1, micros], rank[2, micros]
            assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
            assert two["held"] == {"accumulate": 0, "reduce": 0}
            assert one["held"]["reduce"] == 0
            assert one["held"]["accumulate"] > 0


@pytest.mark.parametrize("name", OVERFLOWS)
def test_overflow_on_one_rank_skips_the_step_on_all(halves, name):
    found = halves(name)
    for each in found:
        assert each["dtypes"] == {"torch.float16"}
        assert each["skipped"] == [0, 1, 1, 1]
        assert each["scales"] == [256, 128, 128, 128]
        assert each["digests"][1] == each["digests"][0] != each["digests"][3]
    assert zero_runs.finite(found)
    assert_copies_identical(found)


@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_dynamic_loss_scale(halves, schedule):
    """From a scale at which everything overflows down to one that works, and up again; the same on all ranks."""
    found = halves(("scale", schedule))
    scales, skipped = [2.0**18, *found[0]["scales"]], [0, *found[0]["skipped"]]
    assert all(rank["scales"] == scales[1:] and rank["skipped"] == skipped[1:] for rank in found)
    for step in range(8):
        factor = scales[step + 1] / scales[step]
        assert factor == 0.5 if skipped[step + 1] > skipped[step] else factor in (1, 2)
    assert scales[1] == 2.0**17
    assert any(later > before for before, later in itertools.pairwise(scales))
    assert zero_runs.finite(found)


def test_fp16_follows_stock(ranks, halves):
    config = by_sgd(training.settings(8, 1, 1, "fp16"))
    stock = ranks.run(1, zero_runs.stock_half, config=config, blocks=8, steps=STEPS)
    for schedule, zero in LIKE_STOCK:
        ours = halves(("like stock", schedule, zero))
        assert ours[0]["skipped"][-1] == 0
        for key in ("losses", "norms"):
            assert ours[0][key] == pytest.approx(stock[0][key], rel=0.01), key
    assert min(ours[0]["norms"]) > config["gradient_clipping"]
