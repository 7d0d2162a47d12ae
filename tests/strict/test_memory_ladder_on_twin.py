"""V-Half, V-Min and a plan under a cap on the strict twin of NCCL."""

import pytest
import training
from test_grid import check

CASES = [  # schedule, pipeline ranks, micro-batches, replicas, ZeRO stage, eager groups, operations in flight, cap
    ("vhalf", 4, 8, 1, 1, True, 8, None),
    ("vhalf", 2, 5, 2, 2, False, 3, None),
    ("vmin", 3, 5, 1, 0, False, 3, None),
    ("vmin", 4, 11, 1, 1, True, 3, None),
    ("zbv", 4, 8, 1, 1, False, 3, 3),
    ("zbv", 3, 3, 2, 1, True, 8, 2),
]


@pytest.mark.all
@pytest.mark.parametrize(("schedule", "pp", "micros", "replicas", "zero", "eager", "in_flight", "cap"), CASES)
def test_training(ranks, on_twin, schedule, pp, micros, replicas, zero, eager, in_flight, cap):
    config = training.settings(micros, replicas, zero, schedule=schedule, activation_cap=cap)
    check(ranks, on_twin, pp, eager, in_flight, config, replicas)
