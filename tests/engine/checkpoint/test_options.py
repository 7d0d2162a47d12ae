"""Each option of loading does what it says, or is refused; what does not fit is one sentence on all ranks."""

from __future__ import annotations

import option_runs
import pytest


def test_what_does_not_fit_is_one_sentence(ranks, tmp_path):
    for said, found in ranks.run(2, option_runs.plain, folder=str(tmp_path)):
        assert found.pop("client state")
        assert set(found.values()) == {found["saved"]}, found
        kinds = {name: kind for name, (kind, _) in said.items()}
        assert kinds.pop("function") == "ConfigError" and set(kinds.values()) == {"CheckpointError"}
        texts = {
            "function": "engine.module",
            "scheduler": "load_lr_scheduler_states=False",
            "another layer": "more.weight",
            "no optimizer": "load_optimizer_states=False",
        }
        assert said.keys() == texts.keys()
        for name, text in texts.items():
            assert text in said[name][1] and said[name][1].count("Traceback") == 0


def test_another_kind_of_optimizer_is_told(ranks, tmp_path):
    for found in ranks.run(2, option_runs.other_kinds, folder=str(tmp_path)):
        assert len(found) == 8
        for tag, (text, gap) in found.items():
            assert gap == pytest.approx(0, abs=1e-6)
            if not isinstance(tag, str):  # of the other kind of checkpoint
                assert ("is a Universal" if tag[1].endswith("u") else "is no Universal Checkpoint") in text, text
                continue
            lacks = "no dampening and no momentum" if tag.startswith("Adam") else "no betas and no eps"
            assert f"another kind of optimizer, which has {lacks}" in text


@pytest.mark.parametrize("zeros", [(0, 1), pytest.param((2,), marks=pytest.mark.all)])
def test_weights_of_a_universal_checkpoint_alone(ranks, tmp_path, zeros):
    for found, said in ranks.run(2, option_runs.universal, folder=str(tmp_path), zeros=zeros):
        for (name, _), (loss, moments) in found.items():
            assert loss == pytest.approx(found[name, None][0], rel=1e-6) and moments == 0, found
        assert len(said) == 1 and "5.frozen.weight" in said[0] and "layer_*" in said[0]
