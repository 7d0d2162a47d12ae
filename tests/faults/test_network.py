"""A network that is down for less than the timeout costs time; for longer, it ends the job on all ranks."""

from __future__ import annotations

import network_runs as runs
import pytest

pytestmark = [
    pytest.mark.all,
    pytest.mark.faults_all,
    pytest.mark.skipif(not runs.available(), reason="needs the right to make network namespaces"),
]


def test_down_for_less_than_the_timeout(tmp_path):
    codes, _, logs, (before, after) = runs.play(tmp_path, down_s=2.0)
    assert codes == [0, 0], logs
    assert after > before


def test_down_for_longer(tmp_path):
    codes, seconds, logs, _ = runs.play(tmp_path, down_s=None)
    assert all(code not in (0, None) for code in codes), (codes, logs)
    assert seconds < 1.5 * runs.TIMEOUT_S, (seconds, logs)  # half as much again is for a machine that is busy
    assert "rank 1 is lost" in logs[0] and "rank 0 is lost" in logs[1], logs
