""" "partition_method": "pairs" and layers of each stage: trained like stock, times of layers, errors."""

from __future__ import annotations

import json
from itertools import accumulate
from types import SimpleNamespace

import balancing
import pytest
import torch
import training
from ranks import RankError

from dualpipe_engine.engine.config import read_config
from dualpipe_engine.engine.placing import balance
from dualpipe_engine.engine.plan import OVERLAPPED, make_lowered_plan
from dualpipe_engine.engine.section import DualPipeConfig
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.cuts.balanced import rank_loads
from dualpipe_engine.schedule.cuts.fastest import costs_of_cut
from dualpipe_engine.schedule.cuts.layer_times import read_layer_costs
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, VEE, Placement
from dualpipe_engine.schedule.timing.costs import UNIT, CostModel
from dualpipe_engine.schedule.timing.simulate import simulate

PLACEMENTS = {"dualpipe": BIDIRECTIONAL, "1f1b": LINEAR, "zbv": VEE}
GIVEN = {"dualpipe": "2,5,4,2", "zbv": "1,1,2,1,3,1,2,2"}


@pytest.fixture(scope="module")
def trained(ranks):
    """Stock (schedule None) and ours, rank by rank."""
    cases = {None: {"config": training.settings(8), "ranks": 4}}
    for schedule in PLACEMENTS:
        config = training.settings(8, schedule=schedule, partition_method="pairs")
        cases[schedule] = {"config": config, "ranks": 4}
    for schedule, counts in GIVEN.items():
        config = training.settings(8, schedule=schedule, partition_method=counts)
        cases[counts] = {"config": config, "ranks": 4}
    found = ranks.run(4, training.each, call=balancing.train, cases=cases)
    return lambda schedule: [rank[schedule] for rank in found]


@pytest.mark.parametrize("schedule", [*PLACEMENTS, *GIVEN.values()])
def test_balanced_cuts_train_like_stock(trained, schedule):
    """The PipelineModule was built with equal layer counts; layers that move bring their weights."""
    stock, ours = trained(None), trained(schedule)
    parts = ours[0]["parts"]
    assert all(rank["parts"] == parts for rank in ours)
    name = next((name for name, counts in GIVEN.items() if counts == schedule), schedule)
    placement = Placement(PLACEMENTS[name], 4)
    assert len(parts) == placement.num_stages + 1
    if schedule in GIVEN.values():
        assert parts == [0, *accumulate(int(count) for count in schedule.split(","))]
    elif schedule != "zbv":
        assert parts != stock[0]["parts"]
        loads, before = (max(rank_loads(balancing.ESTIMATE, cut, placement)) for cut in (parts, stock[0]["parts"]))
        assert loads < before
    built = {name: value for rank in ours for name, value in rank["built"].items()}
    assert ours[0]["losses"] == pytest.approx(stock[0]["losses"], rel=1e-5)
    trained = {name: value for rank in stock for name, value in rank["weights"].items()}
    assert {name for rank in ours for name in rank["weights"]} == trained.keys()
    for rank in ours:
        assert rank["losses"] == ours[0]["losses"]
        for name, value in rank["start"].items():
            assert torch.equal(value, built[name]), name
        for name, value in rank["weights"].items():
            torch.testing.assert_close(value, trained[name], rtol=1e-4, atol=1e-5)


def test_times_of_layers(ranks, tmp_path):
    path = tmp_path / "layers.json"
    found = ranks.run(4, balancing.measure, ranks=2, replicas=2, path=str(path))
    for rank in found:
        assert rank["estimate"] == balancing.ESTIMATE
        assert rank["seconds"] == found[0]["seconds"]
        assert rank["untouched"]
    assert len(found[0]["seconds"]) == len(balancing.ESTIMATE)
    assert min(found[0]["seconds"]) > 0
    assert read_layer_costs(path) == found[0]["seconds"]

    # The stage with the heavy layer takes the few layers at its own end: 25 and 7, not 5 and 27.
    path.write_text(json.dumps([1] * 5 + [20] + [1] * 7))
    config = training.settings(4, schedule="1f1b", partition_method="pairs", layer_costs=str(path))
    cut = ranks.run(2, balancing.train, config=config, ranks=2, steps=1)[0]["parts"]
    assert cut == [0, 6, 13]


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot read"), ("[1, 2]", "2 times"), ("{}", "no list of times")]
)
def test_files_that_do_not_fit_are_refused_on_every_rank(ranks, tmp_path, text, message):
    path = tmp_path / "layers.json"
    if text is not None:
        path.write_text(text)
    config = training.settings(4, schedule="dualpipe", partition_method="pairs", layer_costs=str(path))
    with pytest.raises(RankError) as caught:
        ranks.run(2, training.fails, config=config, ranks=2)
    assert [error[0] for error in caught.value.errors.values()] == ["ConfigError"] * 2
    assert all(message in error[1] for error in caught.value.errors.values())


@pytest.mark.parametrize("counts", ["6,7", "6,6,1,0"])
def test_cuts_that_do_not_fit_are_refused_on_every_rank(ranks, counts):
    config = training.settings(4, schedule="zbv", partition_method=counts)
    with pytest.raises(RankError) as caught:
        ranks.run(2, training.fails, config=config, ranks=2)
    assert [error[0] for error in caught.value.errors.values()] == ["ConfigError"] * 2
    assert all(f"the cut {counts} " in error[1] for error in caught.value.errors.values())


def test_a_given_cut_leaves_no_choice():
    with pytest.raises(ConfigError, match="fixes the number of stages"):
        read_config({"pipeline": {"schedule": "auto", "partition_method": "3,3"}})


def test_pairs_know_what_layers_of_the_moe_model_multiply(ranks):
    """Experts that a token sees, a head for each depth, and a second embedding that only looks up."""
    block = 1088 + 64 + 2 * 3 * 16 * 8 + 384  # attention, router, the two experts of a token, the shared one
    found, _ = ranks.run(2, balancing.estimate_moe, mtp_depth=2, top_k=2, ranks=2)
    assert found == [0, *[block] * 4, 0, 0, *[block + 32 * 16] * 2, 3 * 16 * training.VOCABULARY]


def test_the_search_knows_what_pairs_save(monkeypatch):
    """Of the same layers another cut is the fastest where F&B pairs overlap."""
    weights = [2, 1, 3, 1, 1, 3, 2, 3, 1, 3, 1, 4]
    monkeypatch.setattr(balance, "estimated_costs", lambda module: weights)
    module = SimpleNamespace(_layer_specs=[None] * len(weights))
    config = DualPipeConfig(schedule="dualpipe", partition_method="pairs")
    plan = make_lowered_plan(config, 4, 8, OVERLAPPED.for_placement)
    cuts = [balance.stage_bounds(module, plan, config, costs) for costs in (UNIT, OVERLAPPED)]
    compute = plan.compute_only()
    plain, knowing = (simulate(compute, costs_of_cut(weights, cut, OVERLAPPED)).makespan for cut in cuts)
    assert knowing < 0.98 * plain


def test_measured_costs_are_those_of_the_whole_model():
    """Transfers in the unit of the layers' times, whatever that is."""
    measured = CostModel((1.0, 2.0), (1.0, 3.0), (1.0, 2.0), (2.0, 5.0), comm=0.5)
    assert balance._of_the_model(measured, 2, [20.0]) == CostModel(3.0, 4.0, 3.0, 7.0, comm=1.0)
    assert balance._of_the_model(CostModel(comm=1), 4, [12.0, 12.0]) == CostModel(4, 4, 4, comm=2.0)
    assert balance._of_the_model(CostModel(0, 0, 0), 4, [1.0]) == UNIT


def test_layer_costs_need_pairs():
    with pytest.raises(ConfigError, match='"partition_method": "pairs"'):
        read_config({"pipeline": {"schedule": "dualpipe", "layer_costs": "layers.json"}})
