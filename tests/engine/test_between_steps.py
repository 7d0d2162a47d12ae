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


def test_freezing_is_refused_where_the_optimizer_is_flat(ranks):
    with pytest.raises(RankError, match=r"requires_grad of [03]\.a\.weight has changed, but DeepSpeedZeroOptimizer"):
        ranks.run(2, runs.flipped_with_zero)


def test_buffers_that_forwards_write(ranks):
    losses, buffers = zip(*ranks.run(2, runs.with_buffers, schedule="dualpipev", kinds=("bn", "seen")), strict=True)
    assert losses[0] == losses[1]
    net = runs.Numbered([runs.Moving(False), *[runs.Block() for _ in range(3)]])
    runs.fill(net)
    assert losses[0] == pytest.approx(runs.by_itself(net, torch.optim.SGD(net.parameters(), lr=0.1)), rel=2e-5)
    torch.testing.assert_close((buffers[0] | buffers[1])["0.seen"], net.get_submodule("0").seen)
    with pytest.raises(RankError) as caught:
        ranks.run(2, runs.with_buffers, schedule="dualpipe", kinds=("table", "bn"))
    assert {error[0] for error in caught.value.errors.values()} == {"ConfigError"}
    assert "0.bn (BatchNorm1d) keeps statistics" in str(caught.value)
    with pytest.raises(RankError, match=r"forwards write the buffer 0\.seen"):
        ranks.run(2, runs.with_buffers, schedule="dualpipe", kinds=("seen",))


@pytest.mark.parametrize(("schedule", "zero"), [("dualpipe", 0), ("dualpipe", 1), ("zb1p", 0)])
def test_a_loss_with_parameters_trains_them(ranks, schedule, zero):
    found = ranks.run(2, runs.trained_loss, schedule=schedule, zero=zero)
    for _, weights, last in found:
        if not last:
            del weights["loss_fn.scale"]
    same(found, runs.expected_of_trained_loss())
