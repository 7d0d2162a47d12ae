"""Callbacks, overridden methods and calls of the model: as with a Trainer, or refused with the remedy."""

from __future__ import annotations

import pytest
import trainer_hook_runs as runs
from dualpipe_engine.integrations.transformers.whole_model import whole_names
from safetensors.torch import load_file
from trainer_runs import make_model


def test_a_callback_sees_what_a_trainer_shows_it(ranks, tmp_path):
    theirs = ranks.run(1, runs.watched, folder=str(tmp_path), stock=True)[0]
    assert theirs["gradients"] == 2
    found = ranks.run(2, runs.watched, folder=str(tmp_path))
    assert [each["gradients"] for each in found] == [0, 8]  # of 4 micro-batches each, where the head is
    for ours in found:
        assert {what: ours[what] for what in theirs} == theirs | {"gradients": ours["gradients"]}
        assert all("call save_model() of the Trainer on all ranks" in text for text in ours["part"])
        assert all("use predict(), or load what save_model() has written" in text for text in ours["after"])
        assert "is in the stages of another DualPipeTrainer: go on with that one" in ours["again"]


def test_what_would_come_too_late_or_call_a_part_of_the_model_is_refused(ranks, tmp_path):
    for calling, stepping, logging, regularizing, early, part, missing, other_folder, added, other in ranks.run(
        2, runs.refused, folder=str(tmp_path)
    ):
        assert "model.embed_tokens.weight is in no group of the optimizer" in part and "lr=0.0" in part
        assert "checkpoint-9 is not there to resume from" in missing
        assert "holds no state of an engine" in other_folder
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


def test_the_norm_of_each_step_is_that_of_the_arguments(ranks, tmp_path):
    [theirs] = ranks.run(1, runs.clipped, folder=str(tmp_path / "stock"), stock=True)
    for ours in ranks.run(2, runs.clipped, folder=str(tmp_path / "ours")):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_tied_weights_are_saved_once(tmp_path):
    model = make_model(tie_word_embeddings=True)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    for folder, given in (("plain", None), ("ours", whole_names(model, state))):
        model.save_pretrained(tmp_path / folder, state_dict=given)
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("plain", "ours")]
    assert names[0] == names[1] and "lm_head.weight" not in names[0]
