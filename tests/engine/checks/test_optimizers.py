"""Optimizers that no schedule can step are refused; schedulers of torch work inside of DeepSpeed's optimizers."""

from __future__ import annotations

import optimizer_runs
import pytest
import training

LBFGS = {"optimizer": {"type": "LBFGS", "params": {"lr": 0.1}}}
SCHEDULERS = {
    "StepLR": {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}},
    "CosineAnnealingLR": {"type": "CosineAnnealingLR", "params": {"T_max": 4}},
    "OneCycleLR": {"type": "OneCycleLR", "params": {"max_lr": 0.02, "total_steps": 5}},
}


def test_what_cannot_be_stepped_is_refused(ranks):
    plain = training.settings(4, zero=0, schedule="dualpipe")
    cases = {
        "LBFGS": {"config": plain | LBFGS},
        "LBFGS of the client": {"config": {key: plain[key] for key in plain if key != "scheduler"}, "client": True},
        "sparse, ZeRO-1": {"config": training.settings(4, zero=1, schedule="zb1p"), "sparse": True},
        "sparse, bf16": {"config": training.settings(4, zero=0, precision="bf16", schedule="dualpipe"), "sparse": True},
        "sparse, fp16": {"config": training.settings(4, zero=0, precision="fp16", schedule="zb1p"), "sparse": True},
    }
    found = ranks.run(2, optimizer_runs.refused, cases=cases)
    assert found[0] == found[1]
    for name, (kind, text) in found[0].items():
        assert kind == "ConfigError"
        assert ("whose step() needs no closure" if "LBFGS" in name else "0 has sparse gradients") in text, text


@pytest.mark.parametrize(("zero", "precision"), [(1, "fp32"), (2, "fp32"), (0, "bf16"), (1, "bf16"), (0, "fp16")])
def test_schedulers_of_torch(ranks, zero, precision):
    """Under fp32 without ZeRO DeepSpeed's optimizer is torch's own."""
    plain = ranks.run(2, optimizer_runs.rates, schedulers=SCHEDULERS, zero=0)[0]
    found = ranks.run(2, optimizer_runs.rates, schedulers=SCHEDULERS, zero=zero, precision=precision)
    assert found[0] == found[1]
    for name, steps in found[0].items():
        assert [rate for _, rate, _ in steps] == pytest.approx([rate for _, rate, _ in plain[name]]), name
        assert all(used == told for _, used, told in steps) and len({rate for _, rate, _ in steps}) == 3
        if precision == "fp32":
            assert [loss for loss, *_ in steps] == pytest.approx([loss for loss, *_ in plain[name]], rel=1e-4), name


def test_a_scheduler_that_needs_a_metric_is_refused(ranks):
    """Its remedy works, under ZeRO too."""
    (texts, rates), other = ranks.run(2, optimizer_runs.plateau)
    assert other == (texts, rates)
    assert len(set(texts)) == 1 and "DeepSpeed would give it the batch size" in texts[0]
    assert rates == [0.01, 0.001]


def test_an_engine_without_optimizer_evaluates(ranks):
    found = ranks.run(2, optimizer_runs.without_optimizer, precisions=["fp32", "bf16"])
    assert found[0] == found[1]
    (loss, said), (low, low_said) = found[0]["fp32"], found[0]["bf16"]
    assert low == pytest.approx(loss, rel=0.02)
    assert said == low_said and "needs an optimizer" in said
