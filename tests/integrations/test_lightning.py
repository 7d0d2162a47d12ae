"""`Trainer(strategy="dualpipe")` against the stock Trainer in one process: losses, evaluation, resume, clipping."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ranks import RankError
from torch import nn

pytest.importorskip("lightning")
import lightning_runs as runs
from dualpipe_engine.integrations.lightning import DualPipeStrategy
from dualpipe_engine.integrations.lightning.batches import inputs_and_targets, split
from dualpipe_engine.integrations.lightning.engine import configuration
from dualpipe_engine.integrations.lightning.refusals import (
    refuse_hooks,
    refuse_optimizers,
    refuse_other_loss,
    refuse_trainer,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging

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
    with pytest.raises(RankError, match="saved by another schedule or other ranks"):
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
    assert found[0]["names"] == sorted(runs.chain().state_dict())


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_forward_pre_hook(lambda module, inputs: inputs)
    return model


def with_scale():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return model


def compiled():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.compile()
    return model


def test_what_cannot_be_cut_is_refused():
    shared = torch.nn.Linear(4, 4)
    for model, message in (
        ([shared, torch.nn.GELU(), shared], "layers 0 and 2 share a parameter: say so with .*TiedLayerSpec"),
        (torch.nn.Sequential(shared, torch.nn.GELU(), shared), "layers 0 and 2 share a parameter"),
        (torch.nn.Transformer(8, 2, 1, 1, 8), "must be an nn.Sequential or a list of layers"),
        ([len], "layer 0 must be an nn.Module or a LayerSpec"),
        (Doubled(shared), "the Doubled given as model has a forward of its own"),
        (hooked(), "the Sequential given as model has hooks of its own"),
        (with_scale(), "the Sequential given as model has tensors of its own"),
        (compiled(), "the Sequential given as model has a compiled call of its own"),
    ):
        with pytest.raises(ConfigError, match=message):
            runs.Piped(model, 0.1)
    with pytest.raises(ConfigError, match='needs Trainer\\(strategy="dualpipe"\\)'):
        trainer = runs.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        trainer.fit(runs.Piped(runs.chain(), 0.1), runs.data(16, 1))
    with pytest.raises(ConfigError, match=r"find_unused_parameters=\.\.\.\) is for DistributedDataParallel"):
        DualPipeStrategy(find_unused_parameters=True)
    with pytest.raises(ConfigError, match=r'"scheduler" .* beside configure_optimizers'):
        DualPipeStrategy(deepspeed_config={"scheduler": {"type": "WarmupLR"}})
    with pytest.raises(ConfigError, match='"sequence_parallel_size" must be a whole number'):
        DualPipeStrategy(deepspeed_config={"sequence_parallel_size": "2"})


class OwnBackward(runs.Piped):
    def on_after_backward(self):
        pass


class OwnClipping(runs.Piped):
    def configure_gradient_clipping(self, *args, **kwargs):
        pass


class Watching(Callback):
    def on_before_backward(self, trainer, module, loss):
        pass


def test_what_would_have_no_effect_is_refused():
    manual = runs.Piped(runs.chain(), 1e-3)
    plain = {"module": manual, "base": DualPipeLightningModule, "callbacks": [Callback()]}
    refuse_hooks(**plain)
    manual.automatic_optimization = False
    for given, match in (
        ({}, "automatic_optimization"),
        ({"module": OwnBackward(runs.chain(), 1e-3)}, "OwnBackward.on_after_backward"),
        ({"module": OwnClipping(runs.chain(), 1e-3)}, "OwnClipping.configure_gradient_clipping"),
        ({"module": runs.Piped(runs.chain(), 1), "callbacks": [Watching()]}, "Watching.on_before_backward"),
        ({"module": runs.Piped(runs.chain(), 1), "callbacks": [StochasticWeightAveraging(1e-2)]}, "EMAWeightAveraging"),
        ({"module": runs.Piped(runs.chain(), 1), "callbacks": [BaseFinetuning()]}, "BaseFinetuning adds groups"),
        ({"module": runs.Piped(runs.chain(), 1), "callbacks": [ModelPruning("l1_unstructured")]}, "prune the trained"),
    ):
        with pytest.raises(ConfigError, match=match):
            refuse_hooks(**plain | given)
    outside, shared = runs.Piped(runs.chain(), 1e-3), runs.Piped(runs.chain(), 1e-3)
    outside.scale = nn.Parameter(torch.ones(1))
    whole = runs.Piped(runs.chain(), 1e-3)
    whole.compile()
    next(shared.parameters()).allreduce = False  # as DeepSpeed marks the weights of experts that ranks share
    for strategy, module, match in (
        (SimpleNamespace(), outside, "scale is in no layer of the model"),
        (SimpleNamespace(), shared, "of experts that ranks share"),
        (SimpleNamespace(), whole, r"is compiled as a whole, .* call self.dualpipe_wrapper.engine.compile"),
        (SimpleNamespace(_layer_sync=object()), runs.Piped(runs.chain(), 1), "sync_batchnorm=True"),
    ):
        with pytest.raises(ConfigError, match=match):
            refuse_trainer(SimpleNamespace(callbacks=[], strategy=strategy), module)


def test_losses_without_gradients_are_refused():
    loss = torch.tensor(2.0)
    for found in (loss, {"loss": loss}, loss.clone()):
        refuse_other_loss("Model", found, [loss])
    for found, trained in ((0.5 * loss, [loss]), (None, [loss]), ({"loss": loss + 1}, [loss]), (loss, [loss, loss])):
        with pytest.raises(ConfigError, match=r"Model.training_step must call pipeline_step\(batch\) once"):
            refuse_other_loss("Model", found, trained)
    with pytest.raises(ConfigError, match="factors and other terms into criterion"):
        refuse_other_loss("Model", loss, [])


def test_optimizers_that_are_refused():
    weights = [nn.Parameter(torch.ones(1))]
    adam = torch.optim.Adam(weights)
    zero = {"zero_optimization": {"stage": 1}}
    refuse_optimizers([adam], zero)
    refuse_optimizers([torch.optim.Adafactor(weights)], {"zero_optimization": {"stage": 0}})
    for optimizers, match in (
        ([adam, adam], "2 optimizers"),
        ([], "must return an optimizer"),
        ([torch.optim.LBFGS(weights)], "LBFGS"),
        ([torch.optim.Adafactor(weights)], "Adafactor looks at whole weights"),
    ):
        with pytest.raises(ConfigError, match=match):
            refuse_optimizers(optimizers, zero)


def test_configurations_that_are_refused():
    plain = {"precision": "32-true", "gradient_clip_val": 0.5, "gradient_clip_algorithm": None}
    given = {"schedule": "dualpipe", "extra": {}, "num_chunks": 4, "fitting": True}
    assert configuration(SimpleNamespace(**plain), **given)["gradient_clipping"] == 0.5
    by_value = plain | {"gradient_clip_algorithm": "value"}
    whole = given | {"extra": {"zero_optimization": {"stage": 0}}}
    assert configuration(SimpleNamespace(**by_value), **whole)["gradient_clipping"] == 0
    for precision, section in (("bf16-true", "bf16"), ("16-true", "fp16")):
        found = configuration(SimpleNamespace(**plain | {"precision": precision}), **given)
        assert found[section] == {"enabled": True}
        assert {"bf16", "fp16", "torch_autocast"} & set(found) == {section}
    for settings, match in (
        (plain | {"precision": "16-mixed"}, '"16-true" scales the loss'),
        (plain | {"precision": "64-true"}, "none of the engine's"),
        (by_value, "needs whole gradients in fp32"),
    ):
        with pytest.raises(ConfigError, match=match):
            configuration(SimpleNamespace(**settings), **given)


def test_batches():
    x, y = torch.arange(8.0).view(4, 2), torch.arange(4)
    assert inputs_and_targets((x, y), ("labels",)) == (x, y)
    assert inputs_and_targets({"x": x, "labels": y}, ("labels",)) == (x, y)
    assert inputs_and_targets({"x": x, "z": y, "a": y, "b": x}, ("a", "b")) == ({"x": x, "z": y}, {"a": y, "b": x})
    assert inputs_and_targets(x, ("labels",), needed=False) == (x, None)
    parts = split(({"x": x},), y, 3)
    assert [len(part["x"]) for part, _ in parts] == [2, 2]
    assert [(targets.tolist(), number) for _, (targets, number) in parts] == [([0, 1], 0), ([2, 3], 1)]
    for call, match in (
        (lambda: inputs_and_targets(x, ("labels",)), "must be a pair"),
        (lambda: inputs_and_targets({"x": x}, ("labels",)), "has no 'labels'"),
        (lambda: inputs_and_targets({"labels": x}, ("labels",)), "nothing but targets"),
        (lambda: split((x, torch.ones(3)), y, 2), "cannot be cut into micro-batches"),
        (lambda: split("text", y, 2), "no tensor with rows"),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
