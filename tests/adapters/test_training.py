"""Models of transformers under the engine on gloo processes, against the whole model in one process."""

from __future__ import annotations

import models
import pytest
import torch
import transformers

from dualpipe_engine.cli import main


@pytest.mark.parametrize(
    ("name", "schedule", "world"),
    [
        ("llama", "dualpipe", 2),
        ("llama", "dualpipev", 2),
        ("gpt2", "dualpipe", 4),
        ("gpt2", "1f1b", 2),
        ("mixtral" + models.ROUTERS, "dualpipe", 2),
    ],
)
def test_trains_like_the_whole_model(ranks, tmp_path, name, schedule, world):
    found = ranks.run(
        world, models.train, name=name, schedule=schedule, ranks=world, micros=4, save=str(tmp_path / "saved")
    )
    whole = models.train_whole(name, micros=4)
    assert found[0]["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    weights = found[0]["weights"]
    assert weights.keys() == whole["weights"].keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, whole["weights"][key], rtol=1e-4, atol=2e-5)
    model = models.model_of(models.config_of(name))
    model.save_pretrained(tmp_path, state_dict=dict(weights))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = next(models.stream())[0]["input_ids"]
    model.load_state_dict(weights)
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)

    assert main(["export", "--checkpoint", str(tmp_path / "saved"), "--out", str(tmp_path / "exported")]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(exported.eval()(tokens).logits, model(tokens).logits)
