"""PEFT models: their adapters, switched or not, train and save as in one process, or are refused."""

from __future__ import annotations

import peft
import pytest
import torch
import trainer_peft_runs as runs
from safetensors.torch import load_file

from dualpipe_engine.adapters import get_model_adapter
from dualpipe_engine.errors import ConfigError


def test_adapters_that_are_switched_are_switched_on_all_stages(ranks, tmp_path):
    """Under "dualpipe" half of a rank's stages have come from another one."""
    [theirs] = ranks.run(1, runs.switched, folder=str(tmp_path), stock=True)
    assert len({theirs[what] for what in ("before", "with", "other")}) == 3
    assert theirs["before"] == theirs["without"]
    for ours in ranks.run(2, runs.switched, folder=str(tmp_path)):
        for what, value in theirs.items():
            assert ours[what] == pytest.approx(value, abs=1e-6), what


def test_a_part_of_a_model_is_not_saved_as_the_whole(ranks, tmp_path):
    [theirs] = ranks.run(1, runs.in_part, folder=str(tmp_path), stock=True)
    for ours in ranks.run(2, runs.in_part, folder=str(tmp_path)):
        assert ours["flops"] == theirs["flops"]
        assert all("call save_model() of the Trainer" in ours[what] for what in ("saved", "of the base"))


@pytest.mark.all
@pytest.mark.parametrize("schedule", ["dualpipe", "zb1p"])
def test_adapters_train_and_save_as_in_one_process(ranks, tmp_path, schedule):
    job = {"names": list(runs.HONOURED)}
    [theirs] = ranks.run(1, runs.trained, folder=str(tmp_path / "stock"), stock=True, **job)
    for ours in ranks.run(2, runs.trained, folder=str(tmp_path / "ours"), schedule=schedule, **job):
        for name, expected in theirs.items():
            assert ours[name]["losses"] == pytest.approx(expected["losses"], abs=1e-6), name
            assert ours[name]["norms"] == pytest.approx(expected["norms"], rel=1e-4), name
    for name in runs.HONOURED:
        [file] = (tmp_path / "stock" / name).glob("*.safetensors")
        found, expected = load_file(tmp_path / "ours" / name / file.name), load_file(file)
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", runs.REFUSED)
def test_adapters_that_do_more_than_change_the_blocks_are_refused(name):
    make, match = runs.REFUSED[name]
    model = peft.get_peft_model(runs.tied(), make())
    with pytest.raises(ConfigError, match=match):
        get_model_adapter(model if name == "prompt" else model.get_base_model())
