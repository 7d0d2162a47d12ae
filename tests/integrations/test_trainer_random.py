"""Random numbers of data and of stages in DualPipeTrainer: all ranks of a pipeline read one batch."""

from __future__ import annotations

import pytest
import torch
import trainer_random_runs as runs


def assert_same_batches(found, expected):
    assert len(found["batches"]) == len(expected["batches"])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found["batches"], expected["batches"], strict=True))


@pytest.mark.parametrize("schedule", ["zb1p", pytest.param("dualpipe", marks=pytest.mark.all)])
def test_random_batches_are_those_of_one_process_whatever_the_stages_draw(ranks, tmp_path, schedule):
    theirs = ranks.run(1, runs.masked, folder=str(tmp_path / "stock"), stock=True)[0]
    job = {"num_chunks": 3, "schedule": schedule}
    for ours in ranks.run(2, runs.masked, folder=str(tmp_path / "ours"), **job):
        assert_same_batches(ours, theirs)
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
        assert ours["eval"] == pytest.approx(theirs["eval"], abs=1e-6)
    dropping = ranks.run(2, runs.masked, folder=str(tmp_path / "dropout"), dropout=0.2, **job)
    for ours in dropping:
        assert_same_batches(ours, theirs)
        assert ours["losses"] == dropping[0]["losses"]
        assert ours["losses"][1] != pytest.approx(theirs["losses"][1], abs=1e-4)


@pytest.mark.all
def test_workers_draw_as_those_of_one_process(ranks, tmp_path):
    theirs = ranks.run(1, runs.masked, folder=str(tmp_path / "stock"), stock=True, workers=1)[0]
    for ours in ranks.run(2, runs.masked, folder=str(tmp_path / "ours"), num_chunks=3, workers=1):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
        assert ours["eval"] == pytest.approx(theirs["eval"], abs=1e-6)


@pytest.mark.all
def test_a_resumed_run_draws_the_same(ranks, tmp_path):
    """Random batches as those of a Trainer that is resumed, which collates again; dropout as without a stop."""
    saved = "checkpoint-4"
    ranks.run(1, runs.masked, folder=str(tmp_path / "stock"), stock=True)
    resume = str(tmp_path / "stock" / saved)
    theirs = ranks.run(1, runs.masked, folder=str(tmp_path / "stock"), stock=True, resume=resume)[0]
    job = {"num_chunks": 3, "folder": str(tmp_path / "drawn")}
    ranks.run(2, runs.masked, **job)
    resume = str(tmp_path / "drawn" / saved)
    for ours in ranks.run(2, runs.masked, resume=resume, **job):
        assert_same_batches(ours, theirs)
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
    job |= {"folder": str(tmp_path / "four"), "resume": resume, "resume_elsewhere": True}
    for ours in ranks.run(4, runs.masked, **job):  # ranks 2 and 3 have no file of random states
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)

    job = {"num_chunks": 3, "folder": str(tmp_path / "dropout"), "dropout": 0.2, "drawn": False}
    whole = ranks.run(2, runs.masked, **job)
    resumed = ranks.run(2, runs.masked, resume=str(tmp_path / "dropout" / saved), **job)
    for first, second in zip(whole, resumed, strict=True):
        assert second["losses"] == first["losses"] and second["eval"] == first["eval"]
