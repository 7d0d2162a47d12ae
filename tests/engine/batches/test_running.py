"""What the user changes of a PipelineModule after `initialize` is what the next batch runs, as in DeepSpeed."""

from __future__ import annotations

import pytest
import running_runs as runs


@pytest.mark.parametrize("schedule", ["dualpipe", "1f1b"])
def test_changes_of_the_module_are_followed(ranks, schedule):
    stock, ours = (ranks.run(2, runs.changed, schedule=each)[0] for each in (None, schedule))
    for name, (losses, forwards, reported) in stock.items():
        assert ours[name][0] == pytest.approx(losses, rel=2e-5), name
        assert ours[name][1] == forwards, name
        assert ours[name][2].keys() == reported.keys(), name
    assert stock["computed again"][1] == 2 * stock["kept"][1]


def test_changes_that_no_stage_can_follow(ranks):
    for said, loss in ranks.run(2, runs.refused):
        assert "forward_funcs has another number of layers than at initialize" in said[0]
        assert "0 (BatchNorm1d) keeps statistics" in said[1] and "activations are recomputed" in said[1]
        assert "forward of this PipelineModule was replaced on the object" in said[2]
        assert loss > 0
