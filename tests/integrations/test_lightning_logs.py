"""Numbers that a LightningModule logs: those of one process, or refused."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning")
import lightning_log_runs as runs


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.all)])
def test_sums_over_devices_count_each_sample_once(ranks, tmp_path, world):
    [theirs] = ranks.run(1, runs.counted, folder=str(tmp_path), stock=True)
    assert theirs["rows"] == 32
    for ours in ranks.run(world, runs.counted, folder=str(tmp_path)):
        assert ours == pytest.approx(theirs)


def test_logs_within_the_stages_are_refused(ranks, tmp_path):
    for said in ranks.run(2, runs.within, folder=str(tmp_path)):
        assert "'within' is logged within the stages" in said
