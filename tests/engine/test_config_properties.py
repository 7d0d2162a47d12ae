"""Random JSON sections give a configuration or a DualPipeError, never anything else."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from dualpipe_engine.engine.config import micro_batches, read_by_deepspeed, read_config
from dualpipe_engine.engine.section import DEEPSPEED_KEYS, DualPipeConfig
from dualpipe_engine.errors import ConfigError, DualPipeError
from dualpipe_engine.schedule.orders.registry import SCHEDULES

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(SCHEDULES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from([*DualPipeConfig.model_fields, *DEEPSPEED_KEYS]) | st.text(max_size=10)
sections = st.dictionaries(keys, values, max_size=5)
batch_keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@given(sections | values, st.booleans())
def test_any_section(section, scheduled):
    if scheduled and isinstance(section, dict):
        section = section | {"schedule": "dualpipe"}
    try:
        settings, config = read_config({"pipeline": section})
    except DualPipeError as error:
        assert isinstance(error, ConfigError) and str(error)
    else:
        assert settings["pipeline"] is section
        assert config.is_stock or config.schedule in (*SCHEDULES, "auto") or config.plan_file is not None


@given(st.dictionaries(st.sampled_from(batch_keys), values), st.integers(1, 8))
def test_any_batch_sizes(config, replicas):
    try:
        found = micro_batches(config, replicas)
    except DualPipeError:
        return
    assert found >= 1


@given(st.dictionaries(st.sampled_from(["zero_optimization", "optimizer", "fp16", "checkpoint"]), values | sections))
def test_any_section_of_deepspeed(config):
    try:
        read = read_by_deepspeed({"train_micro_batch_size_per_gpu": 1, **config}, readers=1)
    except DualPipeError as error:
        assert isinstance(error, ConfigError) and str(error)
    else:
        assert read.zero_optimization_stage < 3


@given(st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode()))
def test_any_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        read_config(str(path))
    except DualPipeError as error:
        assert str(error)
