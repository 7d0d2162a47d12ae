"""`dualpipe export`: one state dict out of the layer files of a checkpoint."""

from __future__ import annotations

import contextlib
import resource

import checkpoint_runs as runs
import pytest
import torch
import training
from save_runs import Trap

from dualpipe_engine.cli import main
from dualpipe_engine.engine.checkpoint.files import DESCRIPTION


def loss_of(folder):
    """The mean loss of the exported weights in one process, on what `hop` evaluates."""
    from safetensors.torch import load_file

    module = runs.make_module(1)
    module.load_state_dict(load_file(f"{folder}/model.safetensors"))
    data = training.stream(0, seed=5)
    with torch.no_grad():
        return (
            sum(float(module.loss_fn(module(inputs), labels)) for inputs, labels in (next(data) for _ in range(4))) / 4
        )


@contextlib.contextmanager
def disk_of(size):
    """No file may be larger, in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"layers": 3, "model": null}', "cannot be read"),
        ('{"layers": [{"file": true}], "model": null}', "cannot be read"),
        ('{"layers": [], "model": {"config": 3}}', "cannot be read"),
        ("[" * 9999, "nested too deeply"),
        ('{"layers": [{"file": true, "tied": null}], "model": null}', "layer_00-model_states.pt is missing"),
    ],
)
def test_a_description_that_cannot_be_read_is_one_sentence(tmp_path, capsys, about, text):
    (tmp_path / DESCRIPTION).write_text(about)
    assert main(["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1, said


def test_what_a_layer_file_holds_is_not_unpickled(tmp_path, capsys):
    (tmp_path / DESCRIPTION).write_text('{"layers": [{"file": true, "tied": null}], "model": null}')
    torch.save({"trap": Trap(str(tmp_path / "unpickled"))}, tmp_path / "layer_00-model_states.pt")
    assert main(["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "layer_00" in capsys.readouterr().err and not (tmp_path / "unpickled").exists()


def test_the_weights_are_those_of_the_checkpoint(ranks, tmp_path, capsys):
    settings = training.settings(4, schedule="dualpipe")
    found = ranks.run(2, runs.hop, config=settings, ranks=2, folder=str(tmp_path), save="one", steps=5)
    assert found[0]["before"] != pytest.approx(found[0]["after"], rel=1e-3)
    assert main(["export", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "model.safetensors")]
    (loss,) = ranks.run(1, loss_of, folder=str(tmp_path / "out"))
    assert loss == pytest.approx(found[0]["after"], rel=1e-6)

    for words in (["export", "--checkpoint", str(tmp_path)], ["convert", "--checkpoint", str(tmp_path / "one")]):
        for bytes_left in (100, 900):  # the first file does not fit, and a later one
            with disk_of(bytes_left):
                assert main([*words, "--out", str(tmp_path / f"full_{words[0]}")]) == 2
            said = capsys.readouterr().err.splitlines()
            assert "full" in said[-1] and "cannot be written" in said[-1] and "File too large" in said[-1], said
            assert not [line for line in said if "Traceback" in line]

    for path in (tmp_path / "one").glob("dualpipe*"):
        path.rename(tmp_path / path.name)  # what is left is as of stock DeepSpeed
    assert main(["convert", "--checkpoint", str(tmp_path / "one"), "--out", str(tmp_path / "stock")]) == 2
    assert "was saved by stock DeepSpeed" in (said := capsys.readouterr().err) and "ds_to_universal" in said
    for path in tmp_path.glob("dualpipe*"):
        path.rename(tmp_path / "one" / path.name)

    layer = tmp_path / "one" / "layer_03-model_states.pt"
    layer.write_bytes(layer.read_bytes()[:99])
    assert main(["export", "--checkpoint", str(tmp_path / "one"), "--out", str(tmp_path / "out")]) == 2
    assert layer.name in capsys.readouterr().err
    (tmp_path / "one" / "dualpipe.json").unlink()
    assert main(["export", "--checkpoint", str(tmp_path / "one"), "--out", str(tmp_path / "out")]) == 2
    assert "dualpipe.json is missing" in capsys.readouterr().err
