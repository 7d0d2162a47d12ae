"""What the user did to the PipelineModule is what trains, on every rank that holds a layer."""

from __future__ import annotations

import changed_runs
import pytest
import torch


def same(found, expected):
    losses, weights = expected
    for rank in found:
        assert rank[0] == pytest.approx(losses, rel=2e-5)
        assert rank[1].keys() <= weights.keys()
        for name, value in rank[1].items():
            torch.testing.assert_close(value, weights[name], rtol=2e-5, atol=2e-6, msg=name)
    assert {name for rank in found for name in rank[1]} == weights.keys()


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_changes_move_with_their_layers(ranks, schedule):
    found = ranks.run(2, changed_runs.changed, schedule=schedule, changes=list(changed_runs.CHANGES))
    for change in changed_runs.CHANGES:
        same([rank[change] for rank in found], changed_runs.expected(change))


def test_what_cannot_be_carried_is_named(ranks):
    found = ranks.run(2, changed_runs.cannot_be_carried)
    messages = {message for message, *_ in found}
    assert len(messages) == 1
    text = messages.pop()
    for layer, rank in (1, 1), (3, 0):
        assert f"layer {layer} cannot be carried to pipeline rank {rank}: {layer}._forward_hooks" in text
    assert "log_to.<locals>.log" in text
    assert "TextIOWrapper" in text
    net = changed_runs.Numbered([changed_runs.Holder() for _ in range(2)])
    changed_runs.fill(net)
    losses = changed_runs.by_itself(net, torch.optim.SGD(net.parameters(), lr=0.1))
    same([rank[1:] for rank in found], (losses, dict(net.named_parameters())))
