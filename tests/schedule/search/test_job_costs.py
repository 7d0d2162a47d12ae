import json
from dataclasses import replace

import pytest

from dualpipe_engine.errors import ConfigError, PlanError
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, VEE, Placement
from dualpipe_engine.schedule.search.job_costs import Measurement, gib
from dualpipe_engine.schedule.search.layer_costs import LayerCosts
from dualpipe_engine.schedule.timing.costs import CostModel

FULL = Measurement(
    CostModel((1.0, 2.0), (1.0, 2.0), (0.5, 1.0), (2.0, 4.0), comm=0.1, activation_bytes=(100, 60)),
    2,
    9,
    reduction={"linear": 0.0, "bidirectional": 0.3, "vee": 0.0},
    state_bytes={"linear": 10, "bidirectional": 500},
    memory_bytes=1000,
    job={"model": "a", "device": "cpu"},
)


def test_a_file_holds_all_of_it(tmp_path):
    path = tmp_path / "deeper" / "costs.json"
    FULL.save(path)
    assert Measurement.load(path) == FULL
    assert [each.name for each in path.parent.iterdir()] == ["costs.json"]


def test_layers_too(tmp_path):
    layers = LayerCosts((0, 1, 2), (1.0, 2.0), (100, 60), (3, 4), (False, False))
    full, path = replace(FULL, layers=2, of_layers=layers), tmp_path / "costs.json"
    full.save(path)
    assert Measurement.load(path) == full
    path.write_text(path.read_text().replace("seconds", "hours"))
    with pytest.raises(ConfigError, match="damaged"):
        Measurement.load(path)


def test_differences_name_what_changed():
    assert FULL.differences({"model": "a", "device": "cpu"}) == []
    assert FULL.differences({"model": "b", "torch": "2"}) == [
        "device: cpu -> None",
        "model: a -> b",
        "torch: None -> 2",
    ]


def test_memory_cap_counts_the_largest_stage():
    assert FULL.memory_cap(Placement(BIDIRECTIONAL, 2)) == 5
    assert FULL.memory_cap(Placement(VEE, 2)) is None  # its state is not known
    with pytest.raises(PlanError, match="1000 B are free"):
        Measurement(FULL.costs, 2, 9, state_bytes={"bidirectional": 950}, memory_bytes=1000).memory_cap(
            Placement(BIDIRECTIONAL, 2)
        )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"dualpipe_measurement": 99}', '{"dualpipe_measurement": 2, "ranks": 2, "layers": 2}']
)
def test_what_is_no_measurement_is_refused(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"costs\.json"):
        Measurement.load(path)


@pytest.mark.parametrize("change", [{"ranks": 3}, {"costs": {"f": -1}}, {"costs": {"speed": 1}}, {"costs": None}])
def test_a_damaged_file_is_refused(tmp_path, change):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(json.loads(FULL.to_json()) | change))
    with pytest.raises(ConfigError, match="damaged"):
        Measurement.load(path)


def test_units():
    assert [gib(size) for size in (12, 2048, 3 << 20, 5 << 30)] == ["12 B", "2 KiB", "3 MiB", "5 GiB"]
