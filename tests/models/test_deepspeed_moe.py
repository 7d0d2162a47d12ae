"""`deepspeed.moe.layer.MoE` in a PipelineModule, whole and by phases, against stock DeepSpeed 1F1B."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed_moe_runs
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "engine"))
import training


@pytest.mark.parametrize("zero", [0, 1])
def test_moe_layers_of_deepspeed_train_like_stock(ranks, zero):
    def run(schedule, phased=False):
        settings = training.settings(4, 2, zero=zero, schedule=schedule, clip=0.0)
        settings["scheduler"]["params"]["warmup_num_steps"] = 1
        return ranks.run(4, deepspeed_moe_runs.train, settings=settings, phased=phased)

    stock = run(None)
    expected = {(rank["replica"], name): value for rank in stock for name, value in rank["weights"].items()}
    for phased in (False, True):
        for rank in run("dualpipe", phased):
            assert rank["losses"] == pytest.approx(stock[0]["losses"], rel=1e-5)
            assert rank["losses"][-1] < rank["losses"][0]
            assert ({"dispatch", "combine"} <= rank["transfers"]) == phased
            for name, value in rank["weights"].items():
                torch.testing.assert_close(value, expected[rank["replica"], name], rtol=1e-4, atol=1e-5)
