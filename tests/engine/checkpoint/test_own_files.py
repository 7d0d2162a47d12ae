"""Weights and buffers that DeepSpeed writes no file of are saved, loaded, moved and exported."""

from __future__ import annotations

import own_files_runs
import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import logger

from dualpipe_engine.cli import main
from dualpipe_engine.engine.checkpoint.files import peek, reading
from dualpipe_engine.engine.checkpoint.writer import Writer
from dualpipe_engine.errors import CheckpointError

LINKS = [("as it is", "dualpipe", 0), ("weights", "1f1b", 1), ("converted", "zbv", 1)]
FURTHER = [
    (saved, [("as it is", *saved), ("weights", "zbv", 0), ("converted", "dualpipe", 1), ("converted", "1f1b", 0)])
    for saved in (("1f1b", 0), ("1f1b", 1), ("dualpipe", 1), ("zbv", 2))
]


def check(found):
    for losses in found:
        assert losses.pop("gone") == [True] * 3
        said = losses.pop("saved")
        for (how, *_), again in losses.items():
            if how == "as it is":
                assert again == said
            else:
                assert again[0] == pytest.approx(said[0], rel=1e-5)
            if how == "converted":
                assert again[1] == pytest.approx(said[1], rel=1e-3)


def test_a_bias_of_a_tied_head_and_a_loss_of_parameters_are_saved(ranks, tmp_path):
    check(ranks.run(2, own_files_runs.resumed, folder=str(tmp_path), saved=("dualpipe", 0), links=LINKS))
    from safetensors.torch import load_file

    assert main(["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    weights = load_file(f"{tmp_path}/out/model.safetensors")
    assert weights["5.bias"].abs().max() > 0 and weights["loss_fn.temperature"] != 1
    assert torch.equal(weights["loss_fn.scale"], torch.tensor([0.5]))


class Note:
    """What a layer might keep."""


def test_objects_in_files_of_layers_are_named(tmp_path, monkeypatch):
    """As the file is written, and where it is read, unless the script says that they are safe."""
    path = tmp_path / "layer_01-model_states.pt"
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    reader = TorchCheckpointEngine()
    reader.zipfile_serialization = True
    writer = Writer(reader)
    writer.save({"weight": torch.ones(1), "_extra_state": Note()}, str(path))
    writer.finish(tmp_path, 0)
    assert writer.error is None and len(said) == 1 and "holds objects of test_own_files.Note, as get_" in said[0]
    with pytest.raises(CheckpointError, match=r"test_own_files\.Note.*add_safe_globals"):
        peek(path, weights_only=True)
    with reading(reader, lambda state: state), pytest.raises(CheckpointError, match="add_safe_globals"):
        reader.load(path)
    with torch.serialization.safe_globals([Note]), reading(reader, lambda state: state):
        assert isinstance(reader.load(path)["_extra_state"], Note)


@pytest.mark.all
@pytest.mark.parametrize(("saved", "links"), FURTHER)
def test_they_move(ranks, tmp_path, saved, links):
    check(ranks.run(2, own_files_runs.resumed, folder=str(tmp_path), saved=saved, links=links))
