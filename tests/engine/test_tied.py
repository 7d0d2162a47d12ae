"""A tie shares what is tied, from its first layer; the rest is each layer's own, wherever the layers are."""

from __future__ import annotations

import pytest
import tied_runs
import torch
import training
from ranks import RankError


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p"])
def test_layers_of_two_classes_share_a_weight(ranks, schedule):
    losses, expected = tied_runs.expected()
    found = ranks.run(2, tied_runs.tied, schedule=schedule)
    seen = set()
    for rank_losses, weights in found:
        assert rank_losses == pytest.approx(losses, rel=2e-5)
        for name, value in weights.items():
            last = name.split(".")[-1]
            if "a." not in name:
                seen.add(last)
                torch.testing.assert_close(value, expected[last], rtol=2e-5, atol=2e-6, msg=name)
    assert seen == {"weight", "bias", "scale"}


def test_weights_of_two_shapes_are_refused(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(2, tied_runs.tied, schedule="dualpipev", width=3)
    assert {error[0] for error in caught.value.errors.values()} == {"ConfigError"}
    assert "layer 3 is tied as 't', but its weight is [3, 4] and that of the first layer of the tie [4, 4]" in str(
        caught.value
    )


def test_what_layers_of_two_stages_share_without_a_tie_is_refused(ranks):
    cases = {what: {"what": what} for what in ("module", "function", "weight")}
    for refused in ranks.run(2, training.refusals, call=tied_runs.shared, cases=cases):
        for kind, text in refused.values():
            assert kind == "ConfigError"
            assert "layers 0 and 3 share a weight of shape [4, 4] and are in stages 0 and 1" in text
            assert "make them TiedLayerSpecs of one key" in text


def test_what_is_frozen_or_in_one_stage_may_be_shared(ranks):
    cases = {"frozen": {"what": "module", "frozen": True}, "one stage": {"what": "weight", "behind": True}}
    first, other = ranks.run(2, training.each, call=tied_runs.shared, cases=cases)
    assert first == other
