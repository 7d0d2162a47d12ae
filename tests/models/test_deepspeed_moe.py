"""`deepspeed.moe.layer.MoE` in a PipelineModule, whole and by phases, against stock DeepSpeed 1F1B."""

from __future__ import annotations

import deepspeed_moe_runs
import pytest
import torch
import training


@pytest.fixture(scope="module")
def trained(ranks):
    """Rank by rank, for each ZeRO stage, schedule (None: stock) and way to run a block."""
    cases = {}
    for zero in (0, 1):
        for schedule, phased in ((None, False), ("dualpipe", False), ("dualpipe", True)):
            settings = training.settings(4, 2, zero=zero, schedule=schedule, clip=0.0)
            settings["scheduler"]["params"]["warmup_num_steps"] = 1
            cases[zero, schedule, phased] = {"settings": settings, "phased": phased}
    found = ranks.run(4, training.each, call=deepspeed_moe_runs.train, cases=cases)
    return lambda *case: [rank[case] for rank in found]


@pytest.mark.parametrize("zero", [0, 1])
def test_moe_layers_of_deepspeed_train_like_stock(trained, zero):
    stock = trained(zero, None, False)
    expected = {(rank["replica"], name): value for rank in stock for name, value in rank["weights"].items()}
    for phased in (False, True):
        for rank in trained(zero, "dualpipe", phased):
            assert rank["losses"] == pytest.approx(stock[0]["losses"], rel=1e-5)
            assert rank["losses"][-1] < rank["losses"][0]
            assert ({"dispatch", "combine"} <= rank["transfers"]) == phased
            for name, value in rank["weights"].items():
                torch.testing.assert_close(value, expected[rank["replica"], name], rtol=1e-4, atol=1e-5)


def test_hooks_around_experts_run(ranks):
    found = ranks.run(4, deepspeed_moe_runs.hooked, settings=training.settings(4, 2, schedule="dualpipe"))
    for rank in found:  # blocks 1 and 2, of which the second is hooked
        assert rank["calls"] == [0, 2], "half of the micro-batches"
        assert rank["unphased"] == {2: "it has hooks, which phases would pass by"}


def test_tensor_parallelism_is_refused(ranks):
    ranks.run(4, deepspeed_moe_runs.sliced, settings=training.settings(4, 1, schedule="1f1b"))


@pytest.mark.parametrize("zero", [0, pytest.param(1, marks=pytest.mark.all)])
def test_checkpoints_hold_all_experts(ranks, tmp_path, zero):
    settings = training.settings(4, 2, zero=zero, schedule="dualpipe")
    found = ranks.run(4, deepspeed_moe_runs.resumed, settings=settings, folder=str(tmp_path))
    saved = {name: value for rank in found for name, value in rank["saved"].items()}
    assert len(saved) == 2 * 4 * 4, "layers, experts, weights and biases"
    for rank in found:
        assert rank["loaded"] == rank["losses"]
        assert all(torch.equal(value, saved[name]) for name, value in rank["moved"].items())
    assert {name for rank in found for name in rank["moved"]} == saved.keys()
    file = torch.load(next(tmp_path.glob("*/layer_01-model_states.pt")), weights_only=False)
    assert sum("deepspeed_experts" in name for name in file) == 4 * 4
