"""What the plan says of activations is what engines hold, on each rung of the memory ladder."""

from __future__ import annotations

import ladder_runs
import pytest

WIDE = {"ranks": 4, "layers": 16, "micros": 8, "offloads": (False, 1, True)}
SHAPES = {
    "two stages a rank": {
        "ranks": 2,
        "schedules": ("interleaved",),
        "stages": (2,),
        "layers": 8,
        "micros": 4,
        "offloads": (False, True),
    },
    "linear and mirrored": WIDE | {"schedules": ("1f1b", "zb1p", "dualpipe")},
    "vee": WIDE | {"schedules": ("dualpipev", "zbv", "vhalf", "vmin")},
    "loop": WIDE | {"schedules": ("interleaved", "interleaved_zb"), "stages": (2, 4)},
}


SMALL, *OTHERS = SHAPES


@pytest.mark.parametrize("shape", [SMALL, *(pytest.param(each, marks=pytest.mark.all) for each in OTHERS)])
def test_computed_bytes_are_measured(ranks, shape):
    size = SHAPES[shape]["ranks"]
    by_rung = dict(ranks.run(size, ladder_runs.measure, timeout=900, **SHAPES[shape])[0])
    for rung, row in by_rung.items():
        assert row["measured"] == pytest.approx(row["computed"], rel=0.05), rung
        plain = by_rung[rung._replace(recompute=False, offload=False)]
        assert row["losses"] == plain["losses"], rung
        assert row["measured"] <= 1.01 * plain["measured"], rung
        if rung.schedule in ("1f1b", "interleaved") and rung.recompute:  # no W waits
            assert row["measured"] < 0.7 * plain["measured"], rung
        if rung.schedule == "interleaved" and rung.offload is True:
            assert row["measured"] < 0.7 * plain["measured"], rung
