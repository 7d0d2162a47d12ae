"""`Trainer(strategy="dualpipe")` against the stock Trainer in one process: losses, evaluation, resume, clipping."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ranks import RankError
from torch import nn

pytest.importorskip("lightning")
import lightning_runs as runs
from dualpipe_engine.integrations.lightning.refusals import refuse_hooks
from lightning.pytorch import Callback

from dualpipe_engine.compat import DualPipeLightningModule
from dualpipe_engine.errors import ConfigError


def close(found, expected):
    assert len(found) == len(expected)
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-6


def test_training_evaluation_and_resume(ranks, tmp_path):
    [stock] = ranks.run(1, runs.train, kind="stock", folder=str(tmp_path / "stock"), devices=1)
    folder = tmp_path / "piped"
    piped = ranks.run(2, runs.train, kind="piped", folder=str(folder), devices=2)
    for each in piped:
        assert close(each["losses"], stock["losses"])
        assert close([each["val"], each["validate"]], [stock["val"], stock["validate"]])
        assert (each["step"], each["lr"]) == (stock["step"], stock["lr"])
    assert piped[0]["files"] == stock["files"]
    rows = (folder / "log" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "lr-Adam" in rows[0] and "train_loss" in rows[0] and "val_loss" in rows[0]
    saved = folder / "atstep=4.ckpt"
    state = torch.load(saved, weights_only=False)["state_dict"]
    runs.chain().load_state_dict(state)  # the names are those of the nn.Sequential
    again = ranks.run(2, runs.train, kind="piped", folder=str(tmp_path / "again"), devices=2, seed=5, resume=str(saved))
    for each in again:
        assert close(each["losses"], stock["losses"][4:])
        assert close([each["val"], each["validate"]], [stock["val"], stock["validate"]])
        assert each["step"] == 8
    with pytest.raises(RankError, match="optimizer state of 2 pipeline devices, but there are 4"):
        ranks.run(4, runs.train, kind="piped", folder=str(tmp_path / "four"), devices=4, resume=str(saved))


@pytest.mark.all
def test_accumulated_batches(ranks, tmp_path):
    """On four devices."""
    options = {"accumulate": 2, "steps": 4}
    [stock] = ranks.run(1, runs.train, kind="stock", folder=str(tmp_path / "stock"), devices=1, **options)
    for each in ranks.run(4, runs.train, kind="piped", folder=str(tmp_path / "piped"), devices=4, **options):
        assert close(each["losses"], stock["losses"])
        assert close([each["val"], each["validate"]], [stock["val"], stock["validate"]])
        assert (each["step"], each["lr"]) == (stock["step"], stock["lr"])


@pytest.mark.all
def test_replicas_share_the_samples(ranks, tmp_path):
    """Two pipelines with batches of 16 do what one process does with batches of 32."""
    [stock] = ranks.run(1, runs.train, kind="stock", folder=str(tmp_path / "stock"), devices=1, batch=32, steps=4)
    folder = tmp_path / "piped"
    found = ranks.run(4, runs.train_replicas, folder=str(folder), steps=4)
    for each in found:
        assert close(each["losses"], stock["losses"])
        assert close([each["val"], each["validate"]], [stock["val"], stock["validate"]])
        assert (each["step"], each["lr"]) == (stock["step"], stock["lr"])
    state = torch.load(folder / "atstep=4.ckpt", weights_only=False)["state_dict"]
    expected = torch.load(tmp_path / "stock" / "atstep=4.ckpt", weights_only=False)["state_dict"]
    for name, value in state.items():
        torch.testing.assert_close(value, expected[f"model.{name}"], rtol=1e-4, atol=1e-5)
    with pytest.raises(RankError, match="2 devices are no pipelines of num_stages=4"):
        ranks.run(2, runs.train_replicas, folder=str(tmp_path / "odd"), num_stages=4)


def test_ranks_that_start_apart_train_one_model_on_one_order(ranks, tmp_path):
    found = ranks.run(2, runs.uneven_ranks, folder=str(tmp_path))
    assert found[0]["seen"] == found[1]["seen"]
    assert found[0]["seen"][:4] != found[0]["seen"][4:]  # another order in the second epoch
    assert found[0]["first"] == found[1]["first"]
    assert all(each["copies"] for each in found)  # both copies of a stage stay bit-equal
    assert found[0]["names"] == list(runs.chain().state_dict())


def test_what_cannot_be_cut_is_refused():
    from deepspeed.pipe import TiedLayerSpec

    from dualpipe_engine import ConfigError

    shared = torch.nn.Linear(4, 4)
    for model, message in (
        ([shared, torch.nn.GELU(), shared], "layers 0 and 2 share a parameter"),
        (torch.nn.Sequential(shared, torch.nn.GELU(), shared), "layers 0 and 2 share a parameter"),
        (torch.nn.Transformer(8, 2, 1, 1, 8), "must be an nn.Sequential or a list of layers"),
        ([TiedLayerSpec("head", torch.nn.Linear, 4, 4)], "layer 0 is a TiedLayerSpec"),
        ([len], "layer 0 must be an nn.Module or a LayerSpec"),
    ):
        with pytest.raises(ConfigError, match=message):
            runs.Piped(model, 0.1)
    with pytest.raises(ConfigError, match='needs Trainer\\(strategy="dualpipe"\\)'):
        trainer = runs.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        trainer.fit(runs.Piped(runs.chain(), 0.1), runs.data(16, 1))


class OwnBackward(runs.Piped):
    def on_after_backward(self):
        pass


class Watching(Callback):
    def on_before_backward(self, trainer, module, loss):
        pass


def test_what_would_have_no_effect_is_refused():
    module = runs.Piped(runs.chain(), 1e-3)
    weights = [nn.Parameter(torch.ones(1))]
    adam, lbfgs = torch.optim.Adam(weights), torch.optim.LBFGS(weights)
    plain = {"module": module, "base": DualPipeLightningModule, "callbacks": [Callback()], "optimizers": [adam]}
    plain |= {"precision": SimpleNamespace()}
    refuse_hooks(**plain)
    manual = runs.Piped(runs.chain(), 1e-3)
    manual.automatic_optimization = False
    for given, match in (
        ({"module": manual}, "automatic_optimization"),
        ({"optimizers": [adam, adam]}, "2 optimizers"),
        ({"optimizers": [lbfgs]}, "LBFGS"),
        ({"precision": SimpleNamespace(scaler=object())}, "16-mixed"),
        ({"module": OwnBackward(runs.chain(), 1e-3)}, "OwnBackward.on_after_backward"),
        ({"callbacks": [Watching()]}, "Watching.on_before_backward"),
    ):
        with pytest.raises(ConfigError, match=match):
            refuse_hooks(**plain | given)
    with pytest.raises(ConfigError, match="layer 1 holds BatchNorm1d"):
        runs.Piped(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 1e-3)
    for batch in ({"inputs": torch.ones(2), "targets": torch.ones(2)}, torch.ones(2, 4)):
        with pytest.raises(ConfigError, match="must be a pair"):
            module.pipeline_step(batch)
    with pytest.raises(ConfigError, match="predict"):
        module.predict_step(torch.ones(1))
