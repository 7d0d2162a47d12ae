"""DualPipeTrainer beside the stock Trainer in one process: losses, norms, learning rates, evaluation, files."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import trainer_runs as runs
import transformers
from dualpipe_engine.integrations.transformers.batches import BatchLoss, split_batch

from dualpipe_engine.compat import DualPipeTrainer
from dualpipe_engine.errors import ConfigError


@pytest.fixture(scope="module")
def oracle(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    return {"folder": folder, **ranks.run(1, runs.train, folder=str(folder), stock=True)[0]}


def assert_same(ours, theirs):
    assert sorted(ours["steps"]) == list(range(1, 9))
    for step, (loss, norm, rate) in ours["steps"].items():
        assert loss == pytest.approx(theirs["steps"][step][0], abs=1e-6)
        assert norm == pytest.approx(theirs["steps"][step][1], rel=1e-4)
        assert rate == theirs["steps"][step][2]
    for step, (loss, accuracy) in ours["eval"].items():
        assert loss == pytest.approx(theirs["eval"][step][0], abs=1e-6)
        assert accuracy == theirs["eval"][step][1]


def test_trains_evaluates_saves_and_resumes_like_one_process(ranks, oracle, tmp_path):
    ours = ranks.run(2, runs.train, folder=str(tmp_path), num_chunks=4)
    assert_same(ours[0], oracle)
    assert ours[0] == ours[1] and ours[0]["seen"] == (8, 2)
    assert len({loss for loss, *_ in ours[0]["steps"].values()}) == 8
    resumed = ranks.run(2, runs.train, folder=str(tmp_path), num_chunks=4, resume=str(tmp_path / "checkpoint-4"))
    assert_same(resumed[0], oracle)
    for folder in ("final", "checkpoint-8"):
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        expected = transformers.AutoModelForCausalLM.from_pretrained(oracle["folder"] / folder).state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_replicas_share_the_batches(ranks, tmp_path):
    """Two pipelines of two stages with 4 rows each: the samples of a step differ from 8 rows in one process."""
    found = ranks.run(4, runs.train, folder=str(tmp_path), num_chunks=3, num_stages=2, schedule="dualpipev")
    assert all(each == found[0] for each in found)
    assert found[0]["steps"][8][0] < found[0]["steps"][1][0]


def test_the_short_call_with_profiling(ranks, tmp_path):
    assert ranks.run(2, runs.short, folder=str(tmp_path)) == [3, 3]
    profile = json.loads((tmp_path / "dualpipe_profile.json").read_text())
    assert profile and list(tmp_path.glob("checkpoint-3"))


def test_lora_trains_and_saves_the_adapter(ranks, tmp_path):
    import peft

    theirs = ranks.run(1, runs.train, folder=str(tmp_path / "stock"), stock=True, lora=True)[0]
    ours = ranks.run(2, runs.train, folder=str(tmp_path / "ours"), lora=True, num_chunks=4)[0]
    assert_same(ours, theirs)
    model = peft.PeftModel.from_pretrained(runs.make_model(), tmp_path / "ours" / "final")
    expected = peft.PeftModel.from_pretrained(runs.make_model(), tmp_path / "stock" / "final").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_auxiliary_losses_are_refused():
    model = runs.make_model()
    model.config.output_router_logits = True
    trainer = SimpleNamespace(_engine=None, _configuration=dict, model=model)
    with pytest.raises(ConfigError, match="output_router_logits=False"):
        DualPipeTrainer._make_engine(trainer)


def test_batches_are_cut_into_rows():
    batch = {"input_ids": torch.arange(10).view(5, 2), "labels": torch.arange(5), "note": None}
    micros = split_batch(batch, 2)
    assert [len(labels) for _, labels in micros] == [3, 2] and micros[0][0].keys() == {"input_ids"}
    assert len(split_batch(batch, 8)) == 5
    with pytest.raises(ConfigError, match="labels"):
        split_batch({"x": torch.ones(2)}, 2)
    with pytest.raises(ConfigError, match="rows"):
        split_batch({"x": torch.ones(2), "labels": torch.ones(3)}, 2)


@pytest.mark.parametrize("by_items", [False, True])
def test_the_mean_over_uneven_micro_batches_is_the_loss_of_the_batch(by_items):
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    loss = BatchLoss(torch.nn.functional.mse_loss, (lambda a, b, n: (a - b).square().sum() / n) if by_items else None)
    micros = BatchLoss.label(split_batch({"x": x, "labels": y}, 2), 15 if by_items else None)
    mean = torch.stack([loss(inputs["x"], labels) for inputs, labels in micros]).mean()
    torch.testing.assert_close(mean, torch.nn.functional.mse_loss(x, y).double(), check_dtype=False)
