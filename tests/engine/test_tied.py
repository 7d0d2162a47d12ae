"""A tie shares what is tied, from its first layer; the rest is each layer's own, wherever the layers are."""

from __future__ import annotations

import pytest
import tied_runs
import torch
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
