"""Freezing and changes of weights between steps, buffers that forwards write, losses with parameters."""

from __future__ import annotations

import between_steps_runs as runs
import pytest
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from ranks import RankError
from test_changed import same

from dualpipe_engine.engine.reduction import masters


@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_freezing_and_unfreezing_between_steps(ranks, schedule):
    found = ranks.run(2, runs.flipped, schedule=schedule)
    for case in runs.FLIPS:
        same([rank[case] for rank in found], runs.expected_of_flips(*case))


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_plain_sgd_freezes_in_flat_groups(ranks, precision):
    more = {} if precision is None else {precision: {"enabled": True}}
    found = ranks.run(2, runs.frozen_with, zero_optimization={"stage": 1}, **more)
    if precision is None:
        same(found, runs.expected_of_frozen())
    else:
        losses, weights = runs.expected_of_frozen()
        for rank in found:
            assert rank[0] == pytest.approx(losses, rel=0.02)
            for name, value in rank[1].items():
                torch.testing.assert_close(value, weights[name], rtol=0.02, atol=0.01)


ADAM = {"optimizer": runs.OPTIMIZERS["adam"]}


@pytest.mark.parametrize(
    ("start", "on_ranks", "config", "text"),
    [
        (True, (0, 1), {"zero_optimization": {"stage": 1}, **ADAM}, "has changed, but DeepSpeedZeroOptimizer has made"),
        (False, (0, 1), {"zero_optimization": {"stage": 1}}, "has changed, but DeepSpeedZeroOptimizer has made"),
        (True, (0,), {}, "has changed on some of the ranks that hold a copy"),
        (False, (1,), ADAM, "has changed on some of the ranks that hold a copy"),
    ],
)
def test_flips_that_are_refused(ranks, start, on_ranks, config, text):
    with pytest.raises(RankError) as caught:
        ranks.run(2, runs.refused_flip, timeout=60, start=start, on_ranks=on_ranks, **config)
    errors = caught.value.errors
    assert sorted(errors) == [0, 1]
    assert all(text in error[1] for error in errors.values())
    assert any("requires_grad of 0.a.weight" in error[1] for error in errors.values())


def test_buffers_that_forwards_write(ranks):
    losses, buffers = zip(*ranks.run(2, runs.with_buffers, schedule="dualpipev", kinds=("bn", "seen")), strict=True)
    assert losses[0] == losses[1]
    net = runs.Numbered([runs.Moving("seen"), *[runs.Block() for _ in range(3)]])
    runs.fill(net)
    assert losses[0] == pytest.approx(runs.by_itself(net, torch.optim.SGD(net.parameters(), lr=0.1)), rel=2e-5)
    torch.testing.assert_close((buffers[0] | buffers[1])["0.seen"], net.get_submodule("0").seen)
    with pytest.raises(RankError) as caught:
        ranks.run(2, runs.with_buffers, schedule="dualpipe", kinds=("table", "bn"))
    assert {error[0] for error in caught.value.errors.values()} == {"ConfigError"}
    assert "0.bn (BatchNorm1d) keeps statistics" in str(caught.value)
    with pytest.raises(RankError, match=r"ConfigError: 0\.bn .* would see each twice, as activations are recomputed"):
        ranks.run(2, runs.with_buffers, schedule="zb1p", kinds=("bn",), activation_checkpoint_interval=1)
    with pytest.raises(RankError, match=r"forwards write the buffer 0\.seen"):
        ranks.run(2, runs.with_buffers, schedule="dualpipe", kinds=("seen",))
    with pytest.raises(RankError, match=r"forwards change the buffer 0\.seen again and again"):
        ranks.run(2, runs.with_buffers, schedule="dualpipe", kinds=("counter",))


@pytest.mark.parametrize(("schedule", "zero"), [("dualpipe", 0), ("dualpipe", 1), ("zb1p", 0)])
def test_a_loss_with_parameters_trains_them(ranks, schedule, zero):
    found = ranks.run(2, runs.trained_loss, schedule=schedule, zero=zero)
    for _, weights, last in found:
        if not last:
            del weights["loss_fn.scale"], weights["loss_fn.offset"]
    same(found, runs.expected_of_trained_loss())


HOST = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
EXACT = [
    *[(how, {"zero_optimization": {"stage": zero}}) for how in ("in place", "data") for zero in (0, 1, 2)],
    *[(how, {"zero_optimization": HOST, "zero_force_ds_cpu_optimizer": False}) for how in ("in place", "master")],
]
ROUNDED = [
    *[("data", {"bf16": {"enabled": True}, "zero_optimization": {"stage": zero}}) for zero in (0, 1, 2)],
    *[("data", {"fp16": {"enabled": True, "loss_scale": 64}, "zero_optimization": {"stage": zero}}) for zero in (0, 1)],
    ("master", {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}),
]


def test_weights_that_are_changed_between_steps(ranks, tmp_path):
    found = ranks.run(2, runs.clipped, ways=[*EXACT, *ROUNDED], folder=str(tmp_path))
    losses, weights = runs.expected_of_clipped()
    for number in range(len(EXACT)):
        same([rank[number] for rank in found], (losses, weights))
    for rank in found:
        for number in range(len(EXACT), len(EXACT) + len(ROUNDED)):
            assert rank[number][0] == pytest.approx(losses, rel=0.02), number
            for name, value in rank[number][1].items():
                torch.testing.assert_close(value, weights[name], rtol=0.02, atol=0.01, msg=name)


@pytest.mark.parametrize("pieces", [1 << 24, 3])
def test_masters_that_are_their_weights_stay_precise(pieces, monkeypatch):
    monkeypatch.setattr(masters, "_PIECE", pieces)
    optimizer = FP16_UnfusedOptimizer.__new__(FP16_UnfusedOptimizer)
    kept = torch.tensor([[1.00001, 2.0, 3.00002, float("nan")], [4.0, 65520.0, 1e-9, -1.0]])
    low = kept.half()
    optimizer.fp32_groups, optimizer.fp16_groups = [[kept.clone().requires_grad_()]], [[low.clone()]]
    optimizer.fp16_groups[0][0][0, 1] = 0.5
    masters.Masters().follow(optimizer)
    kept[0, 1] = 0.5
    torch.testing.assert_close(optimizer.fp32_groups[0][0].detach(), kept, rtol=0, atol=0, equal_nan=True)
