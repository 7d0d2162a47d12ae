"""Callbacks, overridden methods and calls of the model: as with a Trainer, or refused with the remedy."""

from __future__ import annotations

import pytest
import trainer_hook_runs as runs


def test_a_callback_sees_what_a_trainer_shows_it(ranks, tmp_path):
    theirs = ranks.run(1, runs.watched, folder=str(tmp_path), stock=True)[0]
    assert theirs["gradients"] == 2
    found = ranks.run(2, runs.watched, folder=str(tmp_path))
    assert [each["gradients"] for each in found] == [0, 8]  # of 4 micro-batches each, where the head is
    for ours in found:
        assert {what: ours[what] for what in theirs} == theirs | {"gradients": ours["gradients"]}
        assert all("call save_model() of the Trainer on all ranks" in text for text in ours["part"])
        assert all("use predict(), or load what save_model() has written" in text for text in ours["after"])


def test_what_would_come_too_late_or_call_a_part_of_the_model_is_refused(ranks, tmp_path):
    for calling, stepping, logging, regularizing, early, added, other in ranks.run(
        2, runs.refused, folder=str(tmp_path)
    ):
        assert "compute_loss is given a model to call" in calling
        assert "override compute_loss" in stepping
        assert "compute_loss logs mine of one micro-batch" in logging
        assert "compute_loss reads the weight lm_head.weight" in regularizing
        assert early == added and early.startswith("Early.on_pre_optimizer_step would see no gradients")
        assert other is None


def test_a_loss_reads_columns_that_the_model_does_not(ranks, tmp_path):
    [theirs] = ranks.run(1, runs.weighed, folder=str(tmp_path), stock=True)
    for ours in ranks.run(2, runs.weighed, folder=str(tmp_path)):
        assert ours == pytest.approx(theirs, abs=1e-5)
