"""What the plan says of activations is what engines hold, on each rung of the memory ladder."""

from __future__ import annotations

import ladder_runs
import pytest


@pytest.mark.all
@pytest.mark.parametrize(
    "shape",
    [
        {"ranks": 2, "schedules": ("interleaved",), "layers": 8, "micros": 4, "offloads": (False, True)},
        {
            "ranks": 4,
            "schedules": ("1f1b", "zb1p", "dualpipe", "zbv"),
            "layers": 16,
            "micros": 8,
            "offloads": (False, 1, True),
        },
    ],
)
def test_computed_bytes_are_measured(ranks, shape):
    found = ranks.run(shape["ranks"], ladder_runs.measure, timeout=900, **shape)[0]
    by_rung = {(name, again, "all" if away is True else away): row for (name, again, away), row in found}
    for rung, row in by_rung.items():
        assert row["measured"] == pytest.approx(row["computed"], rel=0.05), rung
    for name in shape["schedules"]:
        plain, moved, again = by_rung[name, False, False], by_rung[name, False, "all"], by_rung[name, True, False]
        assert plain["losses"] == moved["losses"] == again["losses"]
        if name != "dualpipe":
            assert moved["measured"] <= plain["measured"]
    if shape["ranks"] == 2:
        assert moved["measured"] < 0.7 * plain["measured"]
        assert again["measured"] < 0.7 * plain["measured"]
        assert by_rung["interleaved", True, "all"]["measured"] < 0.5 * plain["measured"]
