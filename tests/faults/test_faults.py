"""A rank that is lost ends all others in time, is named, and leaves the last checkpoint whole.

The default run takes a part of the matrix, --all the whole.
"""

from __future__ import annotations

import re
import signal
from itertools import product

import fault_runs
import pytest
import torch
from fault_runs import FAULTS, PHASES, RANKS, TIMEOUT_S
from ranks import forks

MATRIX = list(product(FAULTS, (0, 1, RANKS - 1), PHASES))
#: Deaths and errors on each rank and in each phase; one SIGSTOP, because it takes its time.
CHOSEN = [
    ("kill", 0, "steady"), ("kill", 1, "reduction"), ("kill", 3, "saving"),
    ("raise", 0, "saving"), ("raise", 1, "warm-up"), ("raise", 3, "cool-down"),
    ("stop", 0, "reduction"),
]  # fmt: skip


@pytest.fixture(scope="module")
def play():
    context = forks()
    ours, theirs = context.Pipe()
    server = context.Process(target=fault_runs.serve, args=(theirs,))
    server.start()
    theirs.close()  # so that a server that has died is an error, not a wait

    def ask(function, folder, **task):
        ours.send({"function": function, "folder": str(folder), **task})
        return ours.recv()

    yield ask
    ours.send(None)
    server.join(10)


def check(play, folder, fault, lost, phase):
    limit = TIMEOUT_S if fault in ("stop", "sleep") else 5.0
    # The limit is the engine's; half as much again is for a machine that is busy with other things.
    codes, seconds, logs = play(fault_runs.struck_run, folder, limit=1.5 * limit, lost=lost, fault=fault, phase=phase)
    case = f"{fault} of rank {lost} in {phase}: codes {codes}, {seconds:.1f} s"
    print(case)
    for rank in set(range(RANKS)) - {lost}:
        assert codes[rank] not in (0, None, -signal.SIGABRT), f"{case}\n{logs[rank]}"
        if fault == "raise" and phase != "reduction":  # all ranks agree on it, and this program does not go on
            what = (
                "is not saved, and what was saved before stands: rank {}: "
                if phase == "saving"
                else "rank {} failed in "
            )
            assert what.format(lost) in logs[rank] and "Boom: poisoned" in logs[rank], f"{case}\n{logs[rank]}"
            continue
        assert f"rank {lost} is lost" in logs[rank], f"{case}\n{logs[rank]}"
        if fault == "raise":
            assert "Boom: poisoned" in logs[rank]
        assert re.search(r"expected to run \S+", logs[rank]), logs[rank]
    if fault != "raise" or phase == "reduction":
        assert any("Waiting: rank" in log for log in logs), logs
    return seconds


def check_loadable(play, folder, phase):
    """The latest checkpoint is the good one and can be read; where another one was being saved, the engine loads it."""
    assert (folder / "latest").read_text() == "good"
    files = list((folder / "good").glob("*.pt"))
    assert len(files) >= RANKS
    for file in files:
        torch.load(file, weights_only=False)
    if phase == "saving":
        codes, _, logs = play(fault_runs.loaded_run, folder, limit=60)
        assert codes == [0] * RANKS, logs


@pytest.mark.parametrize(("fault", "lost", "phase"), CHOSEN)
def test_a_lost_rank_ends_the_others_and_is_named(play, tmp_path, fault, lost, phase):
    check(play, tmp_path, fault, lost, phase)
    check_loadable(play, tmp_path, phase)


@pytest.mark.all
@pytest.mark.parametrize(("fault", "lost", "phase"), MATRIX)
def test_matrix(play, tmp_path, fault, lost, phase):
    check(play, tmp_path, fault, lost, phase)
    check_loadable(play, tmp_path, phase)


def test_a_rank_that_falls_behind_is_named(play, tmp_path):
    check(play, tmp_path, "sleep", 2, "steady")


@pytest.mark.faults_all
def test_ctrl_c_on_one_rank_ends_all(play, tmp_path):
    check(play, tmp_path, "interrupt", 1, "steady")


@pytest.mark.faults_all
def test_ctrl_c_on_all_ranks_ends_all(play, tmp_path):
    codes, seconds, logs = play(fault_runs.interrupted_run, tmp_path, limit=7.5)
    assert all(code not in (0, None) for code in codes), (codes, seconds, logs)
    assert all("KeyboardInterrupt" in log for log in logs), logs


@pytest.mark.faults_all
def test_what_is_raised_between_batches_reaches_every_rank(play, tmp_path):
    codes, _, logs = play(fault_runs.between_run, tmp_path, limit=7.5)
    for code, log in zip(codes, logs, strict=True):
        assert code == 1 and "Boom: poisoned" in log, (codes, log)
    assert all("rank 1 is lost: it failed" in logs[rank] for rank in (0, 2, 3)), logs


@pytest.mark.parametrize(
    ("where", "error", "traceback"),
    [
        ("layer", "Boom: poisoned", "in spoilt_layer"),
        ("loss", "Boom: poisoned", "in spoilt_loss"),
        ("loader", "Boom: poisoned", "in spoilt_loader"),
        ("end", "StopIteration", "in _next_batch"),
    ],
)
def test_what_user_code_raises_reaches_every_rank(play, tmp_path, where, error, traceback):
    codes, seconds, logs = play(fault_runs.user_run, tmp_path, limit=7.5, where=where)
    case = f"{where}: codes {codes}, {seconds:.1f} s"
    print(case)
    for code, log in zip(codes, logs, strict=True):
        assert code not in (0, None), f"{case}\n{log}"
        assert error in log, f"{case}\n{log}"
        assert traceback in log, f"{case}\n{log}"
    said = ("the data ended on rank",) if where == "end" else ("rank 0 failed in",)
    assert all(any(text in log for text in said) for log in logs[1:3]), logs
