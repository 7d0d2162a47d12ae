"""Lists and groups of parameters mean the same parameters on all copies."""

from __future__ import annotations

import grouped_runs
import pytest
from ranks import RankError
from test_changed import same


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_groups_and_lists_mean_the_same_parameters_on_all_copies(ranks, schedule):
    found = ranks.run(2, grouped_runs.grouped, schedule=schedule)
    for name in found[0]:
        losses, weights, norm = grouped_runs.expected_of_groups(name)
        same([rank[name] for rank in found], (losses, weights))
        if "decay" in name:
            assert [rank[name][2] for rank in found] == pytest.approx([norm] * 2, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("foreign_parameter", "a parameter of shape [3] given to initialize does not belong to the PipelineModule"),
        ("dtypes_in_a_group", "0.a.weight is of torch.float64 and 0.a.bias of torch.float32, but ZeRO would make one"),
    ],
)
def test_wrong_groups_are_refused_everywhere(ranks, wrong, text):
    with pytest.raises(RankError) as caught:
        ranks.run(2, getattr(grouped_runs, wrong))
    messages = {error[1] for error in caught.value.errors.values()}
    assert len(caught.value.errors) == 2
    assert len(messages) == 1
    assert messages.pop().startswith(text)
