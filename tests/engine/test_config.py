"""The configuration is read in every form that DeepSpeed reads."""

from __future__ import annotations

import argparse
import base64
import json
import types

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from dualpipe_engine.engine.config import find_config, read_by_deepspeed, read_config
from dualpipe_engine.errors import ConfigError

PLAIN = {"train_batch_size": 4, "pipeline": {"schedule": "zb1p"}}
HJSON = """{
  # comments, and no quotes
  train_batch_size: 4
  pipeline: {
    schedule: zb1p
  }
}"""


@pytest.mark.parametrize("name", ["ds.json", "ds.hjson", "settings", "ds.conf.txt"])
@pytest.mark.parametrize("text", [json.dumps(PLAIN), HJSON], ids=["json", "hjson"])
def test_any_file_name(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    for given in (str(path), path):
        settings, parsed = read_config(given)
        assert settings == PLAIN
        assert parsed.schedule == "zb1p"


@pytest.mark.parametrize("text", [json.dumps(PLAIN), HJSON], ids=["json", "hjson"])
def test_base64(text):
    assert read_config(base64.urlsafe_b64encode(text.encode()).decode())[1].schedule == "zb1p"


def test_deepspeed_config():
    assert read_config(DeepSpeedConfig(dict(PLAIN)))[1].schedule == "zb1p"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"train_batch_size": 4, "train_batch_size": 8}', "more than once"),
        ("[1, 2]", "holds no keys"),
        (None, "neither an existing file"),
    ],
)
def test_what_cannot_be_read(tmp_path, content, text):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=text):
        read_config(path)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"gradient_clipping": None}, '"gradient_clipping" must be a number, 0 for no clipping, got None'),
        ({"gradient_clipping": "auto"}, "got 'auto'"),
        ({"gradient_predivide_factor": 0}, "must be a number above 0, got 0"),
        ({"steps_per_print": 0}, "must be above 0, or null, got 0"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "auto"}}}, '"optimizer": {"params": {"lr": "auto"}} is for a'),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}, '"warmup_num_steps": "auto"'),
    ],
)
def test_values_that_the_first_step_would_trip_over(section, text):
    with pytest.raises(ConfigError) as caught:
        read_by_deepspeed(PLAIN | section, readers=1)
    assert text in str(caught.value)


def test_values_that_are_numbers():
    for section in ({"gradient_clipping": 0}, {"steps_per_print": None}, {"steps_per_print": float("inf")}):
        read_by_deepspeed(PLAIN | section, readers=1)


@pytest.mark.parametrize("value", [True, False])
def test_the_old_form_of_zero(value):
    """What measures the job for "auto" reads a section."""
    settings, _ = read_config(PLAIN | {"zero_optimization": value})
    assert settings["zero_optimization"] == {"stage": int(value)}


def test_where_the_configuration_is_given():
    args = argparse.Namespace(deepspeed_config="a")
    assert find_config(args, None, None) == "a"
    assert find_config(argparse.Namespace(deepscale_config="b"), None, None) == "b"
    assert find_config(args, "c", "d") == "c"
    assert find_config(None, None, "d") == "d"
    assert find_config(types.SimpleNamespace(), None, None) is None
