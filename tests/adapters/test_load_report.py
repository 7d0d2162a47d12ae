"""The load report: rows of each expert, counted on the way, over all ranks that hold copies of a layer."""

from __future__ import annotations

from pathlib import Path

import load_report_runs
import pytest
import training

from dualpipe_engine.engine.config import read_config
from dualpipe_engine.errors import ConfigError


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loads")
    return folder, ranks.run(4, load_report_runs.reports, folder=str(folder))


@pytest.mark.parametrize(
    ("name", "layers", "shares"), [("ours", ["2", "3", "4"], (0.1, 0.2)), ("shared", ["1", "2"], (0.4, 0.6))]
)
def test_rows_are_those_that_routers_have_chosen(runs, name, layers, shares):
    found = [rank[name] for rank in runs[1]]
    for rank in found:
        first, *reports = rank["reports"]
        assert first is None and [each.step for each in reports] == [2, 2, 4], "every second step"
        assert reports == found[0]["reports"][1:] and not rank["counting"]
    last = found[0]["reports"][-1]
    assert [each.layer for each in last.layers] == layers
    for each in last.layers:
        chosen = sum(rank["chosen"][each.layer] for rank in found if each.layer in rank["chosen"])
        assert list(each.rows) == chosen.tolist()
        assert each.ranks == 2 and shares[0] < each.share < shares[1]
    assert found[0]["profile"] == last


def test_monitors_have_two_numbers_of_each_layer(runs):
    folder, found = runs
    last = found[0]["shared"]["reports"][-1]
    for name, value in last.values().items():
        (file,) = Path(folder).rglob(f"*{name.replace('/', '_')}.csv")
        steps = file.read_text().split("\n")[1:]
        assert len([line for line in steps if line]) == 2 and float(steps[1].split(",")[1]) == pytest.approx(value)


def test_without_a_schedule_the_key_is_refused():
    with pytest.raises(ConfigError, match=r"load_report_steps.*does nothing"):
        read_config(training.settings(4) | {"pipeline": {"load_report_steps": 2}})
