"""V-Half, V-Min and plans under a cap in the engine: they train like stock, and like one process."""

import pytest
import test_parity
from pairwise import pairwise
from test_parity import assert_same_training, run_ours, stock  # noqa: F401

FACTORS = test_parity.FACTORS | {
    "schedule": ["vhalf", "vmin", "zbv"],
    "pp": [4, 2, 3],
    "micros": [3, 8, 1, 11],
    "activation_cap": [None, 3, 2],
}
PAIRWISE = pairwise(FACTORS, lambda row: row["pp"] * row["replicas"] <= 8)
KEYS = ("split_backward", "optimize", "activation_cap")


@pytest.mark.parametrize(
    ("schedule", "pp", "micros", "pipeline"),
    [("vhalf", 4, 8, {}), ("vmin", 4, 8, {"split_backward": False}), ("zbv", 4, 8, {"activation_cap": 3})],
)
def test_trains_like_stock(ranks, stock, schedule, pp, micros, pipeline):  # noqa: F811
    assert_same_training(run_ours(ranks, schedule, pp, micros, pipeline=pipeline), stock(pp, micros))


@pytest.mark.all
@pytest.mark.parametrize("case", PAIRWISE, ids=test_parity.name_of)
def test_grid(ranks, stock, case):  # noqa: F811
    shape = {key: case[key] for key in ("pp", "micros", "replicas", "tied")}
    if case["checkpointed"]:
        shape["module_kwargs"] = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
    pipeline = {key: case[key] for key in KEYS}
    ours = run_ours(ranks, case["schedule"], zero=case["zero"], pipeline=pipeline, **shape)
    assert_same_training(ours, stock(**shape))


@pytest.mark.all
@pytest.mark.parametrize("schedule", ["vhalf", "vmin"])
@pytest.mark.parametrize(("pp", "micros"), [(2, 1), (4, 3), (4, 8)])
def test_float64_gradients_equal_one_process(ranks, schedule, pp, micros):
    test_parity.test_float64_gradients_equal_one_process(ranks, schedule, pp, micros)
