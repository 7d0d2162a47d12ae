"""`dualpipe compare --layer-costs`: table and JSON, from the command line."""

import json

import pytest

from dualpipe_engine.cli import main
from dualpipe_engine.schedule.cuts.fastest import costs_of_cut
from dualpipe_engine.schedule.cuts.layer_times import parse_layer_costs, write_layer_costs
from dualpipe_engine.schedule.orders.registry import SCHEDULES, placement_of
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate

#: 160 blocks of 1/20 F on 8 ranks, the first with an embedding of 0.2 F, the last with a head of 1 F; F = I = W.
LAYERS = "0.75,0.15x158,3.15"
SHAPE = ["compare", "--ranks", "8", "--micro-batches", "32", "--layer-costs"]


def output(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def cells(text):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_table_shows_the_gain(capsys):
    rows = {row[0].lstrip("> "): row for row in cells(output(capsys, *SHAPE, LAYERS))}
    assert list(rows) == list(SCHEDULES)
    assert rows["dualpipe"] == ["> dualpipe", "153.6", "117.3", "23.6%", "19 23x6 3"]


@pytest.mark.parametrize(
    "more", [[], pytest.param(["--optimize", "--costs", "1,1,1,2.25", "--comm", "0.05"], marks=pytest.mark.all)]
)
def test_json_can_be_simulated_again(capsys, tmp_path, more):
    path = tmp_path / "layers.json"
    weights = parse_layer_costs(LAYERS)
    write_layer_costs(path, weights)
    data = json.loads(output(capsys, *SHAPE, str(path), "--format", "json", *more))
    assert (data["ranks"], data["micro_batches"], data["layers"]) == (8, 32, 160)
    costs = CostModel(fb=2.25, comm=0.05) if more else CostModel(fb=3.0)
    for row in data["schedules"]:
        for cut in (row["equal_counts"], row["pairs"]):
            placed = costs_of_cut(weights, cut["bounds"], costs)
            plan = make_plan(row["schedule"], 8, 32, placed, optimize=bool(more))
            assert simulate(plan, placed).makespan == cut["makespan"]
        assert row["saved"] == 1 - row["pairs"]["makespan"] / row["equal_counts"]["makespan"] > 0
        assert len(row["pairs"]["bounds"]) == placement_of(row["schedule"], 8).num_stages + 1
    fastest = min(data["schedules"], key=lambda row: row["pairs"]["makespan"])
    assert [row["fastest"] for row in data["schedules"]] == [row is fastest for row in data["schedules"]]


def test_schedules_that_cannot_run_are_named(capsys):
    argv = ["compare", "--ranks", "5", "--micro-batches", "4", "--layer-costs", "1x8"]
    text = output(capsys, *argv)
    assert "even number" in text and "8 layers cannot fill 10 stages" in text
    rows = {row[0].lstrip("> "): row[1:] for row in cells(text)}
    assert rows["zbv"] == ["-"] * 4 and rows["1f1b"][2] == "0.0%"
    found = json.loads(output(capsys, *argv, "--format", "json"))["schedules"]
    zbv = next(row for row in found if row["schedule"] == "zbv")
    assert (zbv["feasible"], zbv["pairs"], zbv["saved"], zbv["fastest"]) == (False, None, None, False)


def test_no_times(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*SHAPE, "1,two"])
    assert stopped.value.code == 2
    assert "'1,two' is no list of times" in capsys.readouterr().err
