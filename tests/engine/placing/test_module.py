"""Converting a PipelineModule in place: weights, names, cuts, parameter groups, data and evaluation."""

from __future__ import annotations

import pytest
import torch
import training
from ranks import RankError


@pytest.fixture(scope="module")
def built(ranks):
    """Rank by rank, for each schedule, `seed_layers` and way to cut."""
    cases = {
        (schedule, seed, method): {"ranks": 4, "schedule": schedule, "seed_layers": seed, "method": method}
        for schedule in ("dualpipe", "dualpipev")
        for seed, method in ((False, "parameters"), (True, "uniform"), (False, "type:block"))
    }
    return ranks.run(4, training.each, call=training.built_weights, cases=cases)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize(("seed_layers", "method"), [(False, "parameters"), (True, "uniform"), (False, "type:block")])
def test_weights_survive_bit_for_bit(built, schedule, seed_layers, method):
    found = [rank[schedule, seed_layers, method] for rank in built]
    before = {name: value for rank in found for name, value in rank["before"].items()}
    for number, rank in enumerate(found):
        assert rank["class"] == "PipelineModule"
        assert rank["same_random_state"]
        assert set(rank["names"]) <= before.keys()
        for name, value in rank["after"].items():
            assert torch.equal(value, before[name]), f"rank {number}: {name}"
    assert {name for rank in found for name in rank["names"]} == before.keys()
    if schedule == "dualpipe":
        assert [rank["stages"] for rank in found] == [(0, 3), (1, 2), (1, 2), (0, 3)]
        assert found[0]["names"] == found[3]["names"]
    else:
        assert [rank["stages"] for rank in found] == [(0, 7), (1, 6), (2, 5), (3, 4)]
        assert len(found[0]["parts"]) == 9


def test_parameter_groups_follow_their_parameters(ranks):
    cases = {how: {"ranks": 4, "how": how} for how in ("groups", "list", "optimizer")}
    everyone = ranks.run(4, training.each, call=training.grouped, cases=cases)
    for rank, first in ((rank[how], everyone[0][how]) for rank in everyone for how in cases):
        assert sorted(name for group in rank["groups"] for name in group) == rank["all"]
        if rank["how"] != "list":
            assert rank["decay"] == [0.5, 0.0]
            assert all(("norm" in name or "bias" in name or name == "10.weight") for name in rank["groups"][1])
            assert len(rank["groups"]) == 2
        assert rank["losses"] == first["losses"]


def test_different_data_at_the_ends_is_refused(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(2, training.odd_ends, ranks=2)
    assert len(caught.value.errors) == 2
    assert all("must read the same stream" in error[1] for error in caught.value.errors.values())


@pytest.mark.parametrize(("pp", "replicas"), [(4, 1), (2, 2)])
def test_features(ranks, pp, replicas):
    found = ranks.run(pp * replicas, training.features, ranks=pp, replicas=replicas)
    first = found[0]
    assert first["plan"] == 6
    assert first["losses"][-1] < first["losses"][0]
    # 4 micro-batches on every stage, each op once, in the merged timeline of the pipeline
    assert len(first["ops"]) == len(set(first["ops"]))
    assert sum("F" in op for op in first["ops"]) == 4 * pp
    assert first["simulated"] > 0
    for number, rank in enumerate(found):
        assert rank["eval"] == first["eval"]
        end = number // replicas in (0, pp - 1)
        assert rank["ends"] == (end, end)
        if end:
            mean = torch.stack([loss.float() for loss in rank["list"]]).mean()
            assert float(mean) == pytest.approx(rank["eval"], rel=1e-6)
            torch.testing.assert_close(torch.stack(rank["logits"]).mean(0), rank["mean_logits"])
            assert float(rank["only_last"]) == rank["eval"]
        else:
            assert rank["list"] is None
            assert rank["logits"] is None
            assert rank["only_last"] is None
