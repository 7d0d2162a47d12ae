"""Random numbers of batches and of stages under Lightning: all ranks of a pipeline read one batch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning")
import lightning_random_runs as runs


def assert_same_batches(found, expected):
    assert len(found["batches"]) == len(expected["batches"])
    for ours, theirs in zip(found["batches"], expected["batches"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_random_batches_are_those_of_one_process_whatever_the_stages_draw(ranks, tmp_path):
    folder = str(tmp_path)
    [theirs] = ranks.run(1, runs.all_cases, folder=folder, stock=True)
    plain = ranks.run(2, runs.all_cases, folder=folder, stock=False)
    dropping = ranks.run(2, runs.all_cases, folder=folder, stock=False, dropout=0.3)
    for case, expected in theirs.items():
        for ours in plain:
            assert_same_batches(ours[case], expected)
            assert ours[case]["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        for ours in dropping:
            assert_same_batches(ours[case], expected)
            assert ours[case]["losses"] != pytest.approx(expected["losses"], abs=1e-4)


@pytest.mark.all
def test_ranks_without_a_seed_read_one_batch(ranks, tmp_path):
    first, second = ranks.run(2, runs.drawn, folder=str(tmp_path), stock=False, case="weighted", seed=None)
    assert_same_batches(first, second)


@pytest.mark.all
def test_a_resumed_run_draws_the_same(ranks, tmp_path):
    job = {"folder": str(tmp_path), "stock": False, "case": "shuffled", "dropout": 0.3}
    whole = ranks.run(2, runs.drawn, epochs=3, **job)
    ranks.run(2, runs.drawn, epochs=1, **job)
    last = tmp_path / "last.ckpt"
    last.symlink_to("1.ckpt")  # as ModelCheckpoint(save_last="link") does
    resumed = ranks.run(2, runs.drawn, epochs=3, resume=str(last), **job)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert_same_batches({"batches": ours["batches"]}, {"batches": theirs["batches"][-len(ours["batches"]) :]})
        assert ours["losses"] == theirs["losses"][-len(ours["losses"]) :]
        assert len(ours["losses"]) == 6
