"""Interleaved schedules on the strict twin of NCCL: the edge from the last rank to the first, and a ring of two."""

import pytest
import training
from test_grid import check

CASES = [  # schedule, stages a rank, pipeline ranks, micro-batches, replicas, ZeRO stage, eager groups, in flight
    ("interleaved", 2, 2, 5, 1, 1, False, 3),
    ("interleaved", 2, 4, 8, 1, 1, True, 8),
    ("interleaved", 3, 3, 4, 1, 0, False, 3),
    ("interleaved_zb", 3, 2, 4, 2, 1, True, 3),
    ("interleaved_zb", 2, 4, 11, 1, 1, False, 3),
    ("interleaved_zb", 2, 3, 1, 2, 2, True, 8),
]


@pytest.mark.all
@pytest.mark.parametrize(("schedule", "stages", "pp", "micros", "replicas", "zero", "eager", "in_flight"), CASES)
def test_training(ranks, on_twin, schedule, stages, pp, micros, replicas, zero, eager, in_flight):
    config = training.settings(micros, replicas, zero, schedule=schedule, stages_per_rank=stages)
    check(ranks, on_twin, pp, eager, in_flight, config, replicas, blocks=stages * pp)
