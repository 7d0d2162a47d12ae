"""Lightning with pipelines that share sequences, against the stock Trainer in one process."""

from __future__ import annotations

import sys

import pytest
import test_trainer as trainers
import torch

pytest.importorskip("lightning")
import lightning_part_runs as runs
from dualpipe_engine.integrations.lightning import DualPipeStrategy

from dualpipe_engine.errors import ConfigError


def check(found, expected):
    for rank in found:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert rank["val"] == pytest.approx(expected["val"], rel=1e-6)
        assert rank["rows"] == expected["rows"]
        for mine, theirs in zip(rank["predicted"], expected["predicted"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-5)


def test_trains_evaluates_and_predicts_like_one_process(ranks, tmp_path):
    [expected] = ranks.run(1, runs.train, folder=str(tmp_path))
    check(ranks.run(4, runs.train, folder=str(tmp_path), size=2), expected)


@pytest.mark.all
def test_lengths_that_cannot_be_cut_are_refused(ranks, tmp_path):
    for told in ranks.run(4, runs.refused, folder=str(tmp_path)):
        assert "sequences of 7 tokens cannot be cut" in told


@pytest.mark.all
def test_resumes(ranks, tmp_path):
    [expected] = ranks.run(1, runs.train, folder=str(tmp_path / "stock"), steps=10)
    ranks.run(4, runs.train, folder=str(tmp_path), size=2, steps=5)
    found = ranks.run(4, runs.train, folder=str(tmp_path), size=2, steps=10, resume=str(tmp_path / "5.ckpt"))
    check(found, expected | {"losses": expected["losses"][5:]})


@pytest.mark.all
def test_twenty_steps_in_fresh_processes_are_those_of_one(tmp_path):
    stock, ours = tmp_path / "stock", tmp_path / "ours"
    for folder, launcher in ((stock, [sys.executable]), (ours, [*trainers.TORCHRUN, "4"])):
        folder.mkdir()
        trainers.start([*launcher, runs.__file__, str(folder), "20"])
    expected = torch.load(stock / "0.pt")
    assert len(expected["losses"]) == 20
    check([torch.load(ours / f"{rank}.pt") for rank in range(4)], expected)


def test_pipelines_that_share_sequences_have_the_same_samples(monkeypatch):
    strategy = DualPipeStrategy(num_stages=2, deepspeed_config={"sequence_parallel_size": 2})
    seen = []
    for rank in range(8):
        monkeypatch.setattr(DualPipeStrategy, "world_size", 8)
        monkeypatch.setattr(DualPipeStrategy, "global_rank", rank)
        seen.append(tuple(strategy.distributed_sampler_kwargs.values()))
    assert seen == [(2, 0), (2, 0), (2, 1), (2, 1)] * 2
    monkeypatch.setattr(DualPipeStrategy, "world_size", 6)
    with pytest.raises(ConfigError, match="2 does not divide the 3 replicas"):
        assert strategy.readers
