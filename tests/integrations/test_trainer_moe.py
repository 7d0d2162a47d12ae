"""DualPipeTrainer with experts: the auxiliary loss over routers, and experts that replicas share."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import trainer_moe_runs as runs
import transformers
from dualpipe_engine.integrations.transformers.batches import split_batch
from dualpipe_engine.integrations.transformers.loss import with_weights
from dualpipe_engine.integrations.transformers.routed_loss import RoutedLoss
from trainer_runs import VOCABULARY, pad

from dualpipe_engine.compat import DualPipeTrainer
from dualpipe_engine.errors import ConfigError

SHARED = {"enabled": True, "autoep_size": 2}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def oracle(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    return {"folder": folder, **ranks.run(1, runs.train, folder=str(folder), stock=True)[0]}


def check(found, oracle, folder):
    for rank in found:
        assert rank["losses"] == pytest.approx(oracle["losses"], abs=2e-6)
        assert rank["norms"] == pytest.approx(oracle["norms"], rel=1e-4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
    expected = transformers.AutoModelForCausalLM.from_pretrained(oracle["folder"] / "final").state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    rows = [runs.Data(runs.ROWS, seed=2)[index] for index in range(runs.ROWS)]
    model.config.router_aux_loss_coef = runs.WEIGHT
    batch = pad(rows)
    with torch.no_grad():
        whole = model(**batch)
    for rank in found:
        torch.testing.assert_close(rank["logits"], whole.logits, rtol=0, atol=1e-5)
    return model, batch


def test_the_auxiliary_loss_is_that_of_one_process(ranks, oracle, tmp_path):
    found = ranks.run(2, runs.train, folder=str(tmp_path), num_chunks=runs.MICROS)
    model, batch = check(found, oracle, tmp_path)
    assert found[0]["loads"] == [{}] * runs.STEPS, "no rank counts where every rank has all experts"
    with torch.no_grad():
        parts = [model(**{name: value[at : at + 4] for name, value in batch.items()}) for at in range(0, 16, 4)]
    mean = torch.stack([part.loss for part in parts]).mean()  # rows are of one length
    assert found[0]["evaluated"] == pytest.approx(float(mean), abs=2e-6)


def test_experts_that_replicas_share_train_like_one_process(ranks, oracle, tmp_path):
    options = {"num_stages": 2, "num_chunks": 2, "rows": runs.ROWS // 2, "expert_parallel": SHARED}
    found = ranks.run(4, runs.train, folder=str(tmp_path), **options)
    check(found, oracle, tmp_path)
    for loads in found[0]["loads"]:
        assert loads.keys() == {
            f"expert_load/layer_{layer}/{what}" for layer in (1, 2) for what in ("max_over_mean", "least_share")
        }
        assert all(value >= 1 for name, value in loads.items() if name.endswith("mean"))


def test_what_cannot_work_is_refused_by_name():
    with pytest.raises(ConfigError, match="leave one of them out"):
        DualPipeTrainer(expert_parallel=SHARED, deepspeed_config={"expert_parallel": SHARED})
    config = transformers.PhimoeConfig(**SMALL, num_local_experts=4, output_router_logits=True)
    trainer = SimpleNamespace(_configuration=dict, _example=None, model=transformers.PhimoeForCausalLM(config))
    with pytest.raises(ConfigError, match="output_router_logits=False"):
        DualPipeTrainer._made_engine(trainer)


class Reading:
    """A trainer whose loss is the model's own, or a sum by the number of items beside `outputs.aux_loss`."""

    loss_is_scaled_for_ga = None
    _row_blocks = 1
    _alone = compute_loss_context_manager = staticmethod(nullcontext)

    def __init__(self, divides):
        self.divides = divides

    def _looks_at_losses(self):
        return True

    def _has_own_loss(self):
        return False

    def _shifted(self):
        return False

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        if not self.divides:
            return model(**inputs).loss
        outputs = model(x=inputs["x"])
        assert outputs.loss is None
        return (outputs.logits - inputs["labels"]).square().sum() / num_items_in_batch + 0.5 * outputs.aux_loss


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("items", [None, 15])
def test_of_the_auxiliary_loss_the_mean_over_uneven_micro_batches_is_taken(divides, items):
    x, y, auxiliary = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0.25, 4.0])
    divides = divides and items is not None
    loss = RoutedLoss(Reading(divides), torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, 0.5)
    micros = with_weights(split_batch({"x": x, "labels": y}, 2), items)
    found = [loss((inputs["x"], each), needed) for (inputs, needed), each in zip(micros, auxiliary, strict=True)]
    expected = torch.nn.functional.mse_loss(x, y) + 0.5 * auxiliary.mean()
    torch.testing.assert_close(torch.stack(found).mean(), expected, check_dtype=False)
