"""Iterators and loaders of the user's own go on where the checkpoint was saved."""

from __future__ import annotations

import position_runs


def test_iterators_and_loaders_go_on(ranks, tmp_path):
    for losses, evaluated in ranks.run(2, position_runs.goes_on, folder=str(tmp_path)):
        assert set(losses.values()) == {losses["saved"]}, losses
        assert evaluated == 4
