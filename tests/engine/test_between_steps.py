"""Freezing between steps, buffers that forwards write, losses with parameters."""

from __future__ import annotations

import between_steps_runs as runs
import pytest
import torch
from ranks import RankError
from test_changed import same


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
            del weights["loss_fn.scale"]
    same(found, runs.expected_of_trained_loss())
