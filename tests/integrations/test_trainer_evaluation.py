"""Evaluation and prediction of DualPipeTrainer: those of a Trainer, with logits only where they are wanted."""

from __future__ import annotations

import evaluation_runs as runs
import pytest
import torch
from ranks import RankError


def assert_alike(found, expected):
    if isinstance(expected, dict):
        timed = ("runtime", "per_second", "preparation_time")
        names = {name for name in expected if not any(each in name for each in timed)}
        assert names <= set(found)
        for name in names:
            assert found[name] == pytest.approx(expected[name], abs=1e-6), name
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_alike(ours, theirs)
    elif expected is None:
        assert found is None
    else:
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=0, atol=2e-6)


@pytest.mark.all
def test_predictions_are_those_of_one_process(ranks, tmp_path):
    theirs = ranks.run(1, runs.outputs, folder=str(tmp_path / "stock"), stock=True)[0]
    for ours in ranks.run(2, runs.outputs, folder=str(tmp_path / "ours")):
        for found, expected in zip(ours, theirs, strict=True):
            assert_alike(found, expected)


def test_logits_are_on_one_rank_and_leave_the_device(ranks, tmp_path):
    """The batch has 8 rows of at most 9 tokens and 61 logits: 17 568 bytes; random states have 12 000."""
    first, last = ranks.run(2, runs.watched, folder=str(tmp_path))
    assert first["metrics"]["eval_accuracy"] == last["metrics"]["eval_accuracy"]
    assert not first["most"] and len(last["most"]) == 6
    assert max(last["most"]) <= 2
    assert max(first["pickled"], last["pickled"]) < 13_000
    assert first["alone"] == last["alone"] and first["alone"][0] == 3


def test_an_error_of_the_metrics_ends_all_ranks(ranks, tmp_path):
    with pytest.raises(RankError) as caught:
        ranks.run(2, runs.failing, folder=str(tmp_path))
    told = {rank: (kind, text) for rank, (kind, text, _) in caught.value.errors.items()}
    assert told[1][0] == "KeyError"
    assert told[0][0] == "DualPipeError" and "rank 1: KeyError('no such metric')" in told[0][1]
