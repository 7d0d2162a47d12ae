"""Interleaved schedules in the engine: they train like stock and like one process."""

from __future__ import annotations

import pytest
import test_parity
import training
from pairwise import pairwise
from ranks import RankError

from dualpipe_engine.engine.auto.choose import choose
from dualpipe_engine.engine.config import read_config
from dualpipe_engine.engine.plan import make_lowered_plan
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.schedule.search.job_costs import Measurement
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel

FACTORS = test_parity.FACTORS | {
    "schedule": ["interleaved_zb", "interleaved"],
    "pp": [4, 2, 3],
    "stages_per_rank": [2, None, 1],
}
PAIRWISE = pairwise(FACTORS, lambda row: row["pp"] * row["replicas"] <= 8)
PLAIN = {"pp": 2, "micros": 5, "replicas": 1, "zero": 1, "tied": True, "checkpointed": False}
FEW = [PLAIN | {"schedule": "interleaved_zb", "stages_per_rank": 3}, PLAIN | {"schedule": "interleaved", "micros": 4}]


@pytest.mark.parametrize("rows", [FEW, pytest.param(PAIRWISE, marks=pytest.mark.all)], ids=["few", "pairwise"])
def test_trains_like_stock(ranks, rows):
    trained = test_parity.shared(ranks, rows)
    for row in rows:
        test_parity.assert_same_training(*trained(row))


@pytest.mark.all
@pytest.mark.parametrize(("pp", "sizes"), [(2, (1, 5)), (4, (3, 8))])
def test_float64_gradients_equal_one_process(ranks, pp, sizes):
    test_parity.gradients_are_those_of_one_process(ranks, pp, sizes, ("interleaved", "interleaved_zb"))


def test_too_few_layers_are_one_sentence(ranks):
    config = training.settings(4, schedule="interleaved", stages_per_rank=3)
    with pytest.raises(RankError) as caught:
        ranks.run(2, training.fails, config=config, ranks=2, blocks=1)
    assert set(caught.value.errors) == {0, 1}
    assert all("5 layers cannot fill 6 pipeline stages" in error[1] for error in caught.value.errors.values())


@pytest.mark.parametrize(
    ("pipeline", "text"),
    [
        ({"schedule": "zbv", "stages_per_rank": 2}, "zbv has a fixed number of stages a rank"),
        ({"schedule": "interleaved", "stages_per_rank": 0}, "greater than or equal to 1"),
        ({"schedule": "1f1b-deepspeed", "stages_per_rank": 2}, "does nothing under DeepSpeed's own schedule"),
        ({"schedule": "PLAN", "stages_per_rank": 2}, "a plan file has its own number of stages a rank"),
    ],
    ids=["fixed number", "none", "stock", "plan file"],
)
def test_stages_that_make_no_sense_are_one_sentence(tmp_path, pipeline, text):
    path = tmp_path / "plan.csv"
    path.write_text(make_plan("interleaved", 2, 4).to_csv())
    schedule = pipeline["schedule"].replace("PLAN", str(path))
    with pytest.raises(ConfigError, match=text):
        read_config({"pipeline": pipeline | {"schedule": schedule}})


def test_auto_takes_the_stages_that_were_asked_for():
    """On transfers for nothing and few micro-batches more stages a rank are faster."""
    _, asked = read_config({"pipeline": {"schedule": "auto", "stages_per_rank": 4}})
    chosen, rows = choose(asked, Measurement(CostModel(), 8, 64), 8)
    assert (chosen.schedule, chosen.stages_per_rank) == ("interleaved_zb", 4)
    assert {row.schedule: row.stages_per_rank for row in rows}["zbv"] is None
    assert make_lowered_plan(chosen, 8, 8).placement.num_stages == 32
    chosen, rows = choose(asked, Measurement(CostModel(), 8, 31), 8)
    assert chosen.stages_per_rank is None
    assert "31 layers cannot fill the 32 stages" in {row.schedule: row.reason for row in rows}["interleaved"]
    assert make_lowered_plan(chosen, 8, 8).schedule == chosen.schedule
