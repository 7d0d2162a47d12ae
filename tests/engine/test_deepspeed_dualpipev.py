"""DeepSpeed's own DualPipeV: what our initialize makes of it, and the column of docs/comparison.md."""

from __future__ import annotations

import math

import deepspeed_dualpipev_runs as runs
import pytest
from deepspeed.pipe import DualPipeVModule

from dualpipe_engine import initialize
from dualpipe_engine.engine.config import read_config
from dualpipe_engine.errors import ConfigError


@pytest.mark.gloo  # DeepSpeed's class sends in one order on both ranks of one group
def test_without_a_schedule_deepspeeds_own_runs_with_the_same_losses(ranks):
    for theirs, ours in ranks.run(2, runs.both):
        assert (theirs[0], ours[0]) == ("DualPipeVEngine", "DualPipeEngine")
        assert theirs[1] == pytest.approx(ours[1], abs=1e-6) and len(set(ours[1])) == 3


def test_with_a_schedule_it_is_refused():
    config = {"train_batch_size": 4, "pipeline": {"schedule": "dualpipev"}}
    with pytest.raises(ConfigError, match="make it a PipelineModule, or leave the schedule out"):
        initialize(model=DualPipeVModule.__new__(DualPipeVModule), config=config)


@pytest.mark.all
def test_its_limits_are_those_of_the_docs(ranks):
    for found in ranks.run(2, runs.limits):
        said = {name: text for name, (text, _) in found.items()}
        assert "gradient_accumulation_steps >= 2 * 2" in said["micro-batches"]
        assert "does not support dynamic_shape" in said["dynamic_shape"] and "ZeRO-2" in said["zero"]
        assert all(math.isfinite(loss) for _, loss in found.values())


def test_keys_of_a_newer_deepspeed_reach_its_own_engine():
    """What no key of ours resembles; under our schedules it would have no effect."""
    for section in ({"transport": "tcp", "shm_bytes": 1}, {"executor": "x", "schedule": "1f1b-deepspeed"}):
        settings, dualpipe = read_config({"pipeline": section})
        assert settings["pipeline"] == section and dualpipe.is_stock
    with pytest.raises(ConfigError, match='unknown key "transport"'):
        read_config({"pipeline": {"transport": "tcp", "schedule": "dualpipe"}})
    with pytest.raises(ConfigError, match='did you mean "overlap"'):
        read_config({"pipeline": {"overlapp": True, "schedule": "1f1b-deepspeed"}})
