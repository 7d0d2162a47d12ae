"""Times of layers as file and as text, and what is none."""

import pytest

from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.cuts.layer_times import parse_layer_costs, read_layer_costs, write_layer_costs


def test_file_and_text_give_the_same_times(tmp_path):
    path = tmp_path / "layers.json"
    times = [0.25, 1.0, 1.0, 1.0, 3e-3, 0.0]
    write_layer_costs(path, times)
    assert read_layer_costs(path) == times
    assert parse_layer_costs(str(path)) == times
    assert parse_layer_costs("0.25,1x3,3e-3,0") == times


@pytest.mark.parametrize("text", ["", "1,,2", "1x", "1x0", "1x-2", "1x2x3", "x3", "a", "-1", "nan,1", "inf", "0x4"])
def test_text_that_is_no_list_of_times(text):
    with pytest.raises(ConfigError, match="no list of times"):
        parse_layer_costs(text)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "3", "[1, null]", '["1"]', "[true]", "[[1]]", "[-1, 2]", "[NaN]", "[0, 0]"]
)
def test_file_that_holds_no_list_of_times(tmp_path, text):
    path = tmp_path / "layers.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"layers\.json is no list of times"):
        read_layer_costs(path)


def test_files_that_cannot_be_read_or_written(tmp_path):
    (tmp_path / "text.json").write_text("1, 2")
    for name in ("absent.json", "text.json"):
        with pytest.raises(ConfigError, match="cannot read"):
            read_layer_costs(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot write"):
        write_layer_costs(tmp_path / "no folder" / "layers.json", [1.0])
