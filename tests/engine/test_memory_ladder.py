"""V-Half, V-Min and plans under a cap in the engine: they train like stock, and like one process."""

from __future__ import annotations

import pytest
import test_parity
from pairwise import pairwise

FACTORS = test_parity.FACTORS | {
    "schedule": ["vhalf", "vmin", "zbv"],
    "pp": [4, 2, 3],
    "activation_cap": [None, 3, 2],
}
PAIRWISE = pairwise(FACTORS, lambda row: row["pp"] * row["replicas"] <= 8)
PLAIN = {"pp": 4, "micros": 8, "replicas": 1, "zero": 1, "tied": True, "checkpointed": False}
FEW = [
    PLAIN | {"schedule": "vhalf"},
    PLAIN | {"schedule": "vmin", "split_backward": False},
    PLAIN | {"schedule": "zbv", "activation_cap": 3},
]


@pytest.mark.parametrize("rows", [FEW, pytest.param(PAIRWISE, marks=pytest.mark.all)], ids=["few", "pairwise"])
def test_trains_like_stock(ranks, rows):
    trained = test_parity.shared(ranks, rows)
    for row in rows:
        test_parity.assert_same_training(*trained(row))


@pytest.mark.all
@pytest.mark.parametrize(("pp", "sizes"), [(2, (1,)), (4, (3, 8))])
def test_float64_gradients_equal_one_process(ranks, pp, sizes):
    test_parity.gradients_are_those_of_one_process(ranks, pp, sizes, ("vhalf", "vmin"))
