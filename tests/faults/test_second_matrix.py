"""The second matrix: strangers while a job is idle, trains and saves, and folders in which saving fails.

`pytest --all -m faults_all` runs it with the rest that is marked so: failures in every place, a network that is down,
bits that flip, signals, fuzzed lines at the listener.
"""

from __future__ import annotations

import pytest
import second_runs as runs

pytestmark = [pytest.mark.all, pytest.mark.faults_all]


@pytest.mark.parametrize("phase", runs.PHASES)
def test_strangers_do_nothing_to_a_job(ranks, tmp_path, phase, capfd):
    found = ranks.run(2, runs.visited, timeout=120, folder=str(tmp_path), phase=phase)
    calls = found[0][1]
    assert set(calls) == set(runs.KINDS) and all(calls.values()), calls
    losses = found[0][0]
    assert losses == found[1][0] == ranks.run(2, runs.undisturbed, steps=len(losses))[0]
    assert "error in the lifeline" not in capfd.readouterr().err
    if phase == "saving":
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == len(runs.KINDS)


@pytest.mark.parametrize("background", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("how", ["full", "read-only", "removed"])
def test_a_folder_that_fails_costs_the_save(ranks, tmp_path, how, background):
    clean = ranks.run(2, runs.undisturbed, steps=3)[0]
    for error, losses, path in ranks.run(2, runs.failing, folder=str(tmp_path), how=how, background=background):
        assert "is not saved, and what was saved before stands: rank 0" in error
        assert losses == clean and "good" in path
