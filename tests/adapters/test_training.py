"""Models of transformers under the engine on gloo processes, against the whole model in one process."""

from __future__ import annotations

import models
import pytest
import torch
import training
import transformers

from dualpipe_engine.cli import main

CASES = [
    ("llama", "dualpipe", 2),
    ("llama", "dualpipev", 2),
    ("gpt2", "dualpipe", 4),
    ("gpt2", "1f1b", 2),
    ("mixtral" + models.ROUTERS, "dualpipe", 2),
]


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """What rank 0 has of a case, and the folder of its checkpoint; cases on as many ranks share a start."""
    folder, runs = tmp_path_factory.mktemp("saved"), {}

    def of(case):
        world = case[-1]
        if world not in runs:
            cases = {
                each: {
                    "name": each[0],
                    "schedule": each[1],
                    "ranks": world,
                    "micros": 4,
                    "save": str(folder / "-".join(each[:2])),
                }
                for each in CASES
                if each[-1] == world
            }
            [runs[world], *_] = ranks.run(world, training.each, call=models.train, cases=cases)
        return runs[world][case], folder / "-".join(case[:2])

    return of


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_trains_like_the_whole_model(trained, tmp_path, case):
    name, *_ = case
    found, saved = trained(case)
    whole = models.train_whole(name, micros=4)
    assert found["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    weights = found["weights"]
    assert weights.keys() == whole["weights"].keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, whole["weights"][key], rtol=1e-4, atol=2e-5)
    model = models.model_of(models.config_of(name))
    model.save_pretrained(tmp_path, state_dict=dict(weights))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = next(models.stream())[0]["input_ids"]
    model.load_state_dict(weights)
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)

    assert main(["export", "--checkpoint", str(saved), "--out", str(tmp_path / "exported")]) == 0
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(exported.eval()(tokens).logits, model(tokens).logits)
