""" "partition_method": "pairs": the same training as stock on another cut, times of layers, errors."""

from __future__ import annotations

import json

import balancing
import pytest
import torch
import training
from ranks import RankError

from dualpipe_engine.engine.config import read_config
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.cuts.balanced import rank_loads
from dualpipe_engine.schedule.cuts.layer_times import read_layer_costs
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, VEE, Placement

PLACEMENTS = {"dualpipe": BIDIRECTIONAL, "1f1b": LINEAR, "zbv": VEE}


@pytest.fixture(scope="module")
def trained(ranks):
    """Stock (schedule None) and ours, rank by rank."""
    cases = {None: {"config": training.settings(8), "ranks": 4}}
    for schedule in PLACEMENTS:
        config = training.settings(8, schedule=schedule, partition_method="pairs")
        cases[schedule] = {"config": config, "ranks": 4}
    found = ranks.run(4, training.each, call=balancing.train, cases=cases)
    return lambda schedule: [rank[schedule] for rank in found]


@pytest.mark.parametrize("schedule", PLACEMENTS)
def test_balanced_cuts_train_like_stock(trained, schedule):
    """The PipelineModule was built with equal layer counts; layers that move bring their weights."""
    stock, ours = trained(None), trained(schedule)
    parts = ours[0]["parts"]
    assert all(rank["parts"] == parts for rank in ours)
    placement = Placement(PLACEMENTS[schedule], 4)
    assert len(parts) == placement.num_stages + 1
    if schedule != "zbv":
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


def test_layer_costs_need_pairs():
    with pytest.raises(ConfigError, match='"partition_method": "pairs"'):
        read_config({"pipeline": {"schedule": "dualpipe", "layer_costs": "layers.json"}})
