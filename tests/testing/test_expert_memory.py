"""What `dualpipe memory --model` computes for experts that ranks share is what engines hold."""

from __future__ import annotations

import expert_memory_runs
import pytest


@pytest.mark.all
@pytest.mark.parametrize(("schedule", "precision"), [("dualpipe", "bf16"), ("1f1b", "fp32")])
def test_computed_bytes_are_measured(ranks, schedule, precision):
    found = ranks.run(4, expert_memory_runs.measure, schedule=schedule, zero=1, precision=precision)
    for rank in found:
        measured, computed = rank["measured"], rank["computed"]
        assert measured.weights == computed.weights
        assert measured.optimizer == pytest.approx(computed.optimizer, rel=0.01)  # partitions are padded
        assert rank["left"] == 0
    for stage in (0, 1):  # how many rows go to which of the two ranks is the router's choice
        sharing = [rank for rank in found if rank["rank"] == stage]
        for name in ("measured", "computed"):
            assert len({rank[name].weights for rank in sharing}) == 1
        held = sum(rank["measured"].activations for rank in sharing)
        assert held == pytest.approx(sum(rank["computed"].activations for rank in sharing), rel=0.05)
    # Of what is handed to the all-to-alls one half stays on the rank.
    sent, computed = (sum(rank[name] for rank in found) for name in ("sent", "leaving"))
    assert sent / 2 == computed
