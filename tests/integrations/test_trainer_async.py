"""Checkpoints of DualPipeTrainer that a thread writes: whole when `train` returns, resumed alike, with errors told."""

from __future__ import annotations

import pytest
import trainer_runs as runs
from ranks import RankError

ASYNC = {"checkpoint": {"async": True}}


def failing(folder):
    """The disk of rank 1 is full when the last checkpoint is written."""
    from unittest.mock import patch

    import torch.distributed as dist

    from dualpipe_engine.engine.checkpoint import writer

    sync = writer.sync

    def full(path):
        if dist.get_rank() == 1 and "checkpoint-8" in str(path):
            raise OSError(28, "No space left on device")
        sync(path)

    with patch.object(writer, "sync", full):
        runs.train(folder, num_chunks=4, deepspeed_config=ASYNC)


@pytest.mark.all
def test_whole_at_the_end_and_resumed_alike(ranks, tmp_path):
    job = {"folder": str(tmp_path), "num_chunks": 4, "deepspeed_config": ASYNC}
    ours = ranks.run(2, runs.train, **job)
    for number in (4, 8):
        folder = tmp_path / f"checkpoint-{number}"
        assert (folder / "engine" / "dualpipe_files.json").is_file() and not list(folder.glob("*.partial"))
    resumed = ranks.run(2, runs.train, resume=str(tmp_path / "checkpoint-4"), **job)
    for first, second in zip(ours, resumed, strict=True):
        assert (second["steps"], second["eval"]) == (first["steps"], first["eval"])


@pytest.mark.all
def test_an_error_reaches_the_user(ranks, tmp_path):
    with pytest.raises(RankError) as caught:
        ranks.run(2, failing, folder=str(tmp_path))
    for kind, text, _ in caught.value.errors.values():
        assert kind == "CheckpointError" and "rank 1: OSError: [Errno 28]" in text
