"""DualPipeTrainer whose replicas share sequences, beside the stock Trainer in one process."""

from __future__ import annotations

import sys

import pytest
import test_trainer as trainers
import test_trainer_moe as moe
import torch
import trainer_kinds as kinds
import trainer_moe_runs
import trainer_runs as runs

SHARED = {"deepspeed_config": kinds.shared(2), "num_stages": 2}
EVEN = {"num_chunks": 3, "collate": runs.pad_even}


@pytest.fixture(scope="module")
def oracle(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    return {"folder": folder, **ranks.run(1, runs.train, folder=str(folder), stock=True, collate=runs.pad_even)[0]}


def test_trains_and_evaluates_like_one_process(ranks, oracle, tmp_path):
    """Rows of padding, and micro-batches of different numbers of labels."""
    ours = ranks.run(4, runs.train, folder=str(tmp_path), **SHARED, **EVEN)
    trainers.assert_same(ours[0], oracle)
    assert all(each == ours[0] for each in ours)


@pytest.mark.all
def test_resumes_here_and_where_sequences_are_whole(ranks, oracle, tmp_path):
    ranks.run(4, runs.train, folder=str(tmp_path), **SHARED, **EVEN)
    go_on = {"resume": str(tmp_path / "checkpoint-4"), **EVEN}
    resumed = ranks.run(4, runs.train, folder=str(tmp_path / "parts"), **SHARED, **go_on)
    whole = ranks.run(2, runs.train, folder=str(tmp_path / "whole"), resume_elsewhere=True, **go_on)
    for found in (resumed, whole):
        trainers.assert_same(found[0], oracle)


@pytest.mark.all
def test_losses_and_optimizers_are_those_of_the_trainer(ranks, tmp_path):
    names = kinds.OF_TOKENS
    theirs = ranks.run(1, kinds.run_kinds, names=names, folder=str(tmp_path / "stock"), stock=True, even=True)[0]
    ours = ranks.run(4, kinds.run_kinds, names=names, folder=str(tmp_path), num_chunks=3, even=True, **SHARED)
    trainers.assert_kinds(ours, theirs)


REFUSED = {
    "smoothed": "label_smoothing_factor= takes the logits of whole sequences",
    "mean of tokens": "compute_loss_func= takes the logits",
    "own loss": "Focal.compute_loss takes the logits",
    "sequence classes": "not known to give an output for each token",
    "images": "not known to give an output for each token",
}


def test_what_needs_whole_sequences_is_refused(ranks, tmp_path):
    for rank in ranks.run(4, kinds.refused, names=list(REFUSED), folder=str(tmp_path), num_chunks=3, **SHARED):
        assert rank.keys() == REFUSED.keys()
        for name, text in REFUSED.items():
            assert text in rank[name], name


@pytest.mark.all
def test_experts_and_their_auxiliary_loss(ranks, tmp_path):
    """Of two groups of two replicas, each with half of a batch; experts that all four share."""
    folder = tmp_path / "stock"
    theirs = ranks.run(1, trainer_moe_runs.train, folder=str(folder), stock=True)[0]
    options = {"num_chunks": 2, "rows": trainer_moe_runs.ROWS // 2, "expert_parallel": moe.SHARED}
    found = ranks.run(8, trainer_moe_runs.train, folder=str(tmp_path), timeout=300, **options, **SHARED)
    moe.check(found, {"folder": folder, **theirs}, tmp_path)


@pytest.mark.all
def test_twenty_steps_in_fresh_processes_are_those_of_one(tmp_path):
    stock, ours = tmp_path / "stock", tmp_path / "ours"
    for folder, launcher in ((stock, [sys.executable]), (ours, [*trainers.TORCHRUN, "4"])):
        folder.mkdir()
        trainers.start([*launcher, kinds.__file__, str(folder), "20", "2"])
    theirs = torch.load(stock / "0.pt")
    assert theirs.keys() == {*kinds.OF_TOKENS} and all(len(each["losses"]) == 20 for each in theirs.values())
    trainers.assert_kinds([torch.load(ours / f"{rank}.pt") for rank in range(4)], theirs, 5e-6)
