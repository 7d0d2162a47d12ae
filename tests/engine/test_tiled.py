""" "tiled_loss" and "tiled_mlp": the training of whole sequences, and sentences where tiles do not fit."""

from __future__ import annotations

from functools import partial

import pytest
import tiled_runs
import torch
from ranks import RankError
from torch import nn
from transformers.pytorch_utils import Conv1D

from dualpipe_engine.engine.config import read_config
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.runtime.tiles import TiledLayer, Tiles
from dualpipe_engine.schedule.orders.registry import SCHEDULES

BOTH = {"tiled_loss": 3, "tiled_mlp": 2}
#: schedule, ZeRO stage, model, more of the "pipeline" section
SHORT = [
    ("dualpipe", 1, {"mtp_depth": 1}, {"recompute": True}),
    ("zb1p", 2, partial(tiled_runs.of_transformers, routed=False), {"overlap": False}),
]
ALL = [
    (schedule, number % 3, model, {"offload_activations": True} if number % 2 else {})
    for number, schedule in enumerate(SCHEDULES)
    for model in (
        {"mtp_depth": 1, "balancing": "loss"},
        *(partial(tiled_runs.of_transformers, routed=routed) for routed in (True, False)),
    )
]


@pytest.mark.parametrize("cases", [SHORT, pytest.param(ALL, marks=pytest.mark.all)], ids=["some", "all"])
def test_trains_as_whole_sequences_do(ranks, cases):
    runs = {}
    for number, (schedule, zero, model, more) in enumerate(cases):
        for tiles in ({}, BOTH):
            runs[number, bool(tiles)] = {"schedule": schedule, "zero": zero, "model": model, **more, **tiles}
    found = ranks.run(2, tiled_runs.train, cases=runs, ranks=2, timeout=900)
    for number in range(len(cases)):
        for rank in found:
            plain, tiled = rank[number, False], rank[number, True]
            for key in ("losses", "evaluated", "norm"):
                assert tiled[key] == pytest.approx(plain[key], rel=1e-5), (cases[number][0], key)
            for name, weight in plain["weights"].items():
                torch.testing.assert_close(tiled["weights"][name], weight, rtol=1e-4, atol=1e-5)
            assert not plain["whole"]
        whole = [name for rank in found for name in rank[number, True]["whole"] or ()]
        split = any(rank[number, False]["whole"] is not None for rank in found)
        assert any("mlp" in name for name in whole) == split, cases[number][0]


@pytest.mark.all
def test_half_precision(ranks):
    case = {"schedule": "zbv", "zero": 1, "precision": "bf16", "model": {"mtp_depth": 1}}
    for rank in ranks.run(2, tiled_runs.train, cases={"plain": case, "tiled": case | BOTH}, ranks=2):
        assert rank["tiled"]["losses"] == pytest.approx(rank["plain"]["losses"], rel=2e-2)
        assert rank["tiled"]["norm"] == pytest.approx(rank["plain"]["norm"], rel=5e-2)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            {"tiled_loss": 2, "loss_fn": nn.functional.cross_entropy, "head": tiled_runs.Capped},
            "is not known to be a sum",
        ),
        ({"tiled_loss": 2}, "has no known projection"),
        ({"tiled_loss": 2, "head": tiled_runs.Capped}, "changes the logits behind its projection"),
        ({"tiled_mlp": 2}, "no layer has a module called mlp"),
        ({"tiled_mlp": 2, "mlp": nn.Dropout(0.5)}, "draws random numbers"),
        ({"tiled_mlp": 2, "mlp": tiled_runs.Mean()}, "mixes positions"),
    ],
)
def test_what_does_not_fit_is_refused(ranks, case, said):
    with pytest.raises(RankError, match=said):
        ranks.run(2, tiled_runs.refused, **case)


def test_logits_that_never_exist_are_refused(ranks):
    with pytest.raises(RankError, match="logits are never whole"):
        ranks.run(2, tiled_runs.logits)


def test_a_forward_of_the_users_comes_back():
    own, untouched = nn.Linear(4, 4), nn.Linear(4, 4)
    own.forward = given = lambda x: 2 * x
    replaced = [
        make(part) for part in (own, untouched) for make in (lambda p: Tiles(p, 2), lambda p: TiledLayer(p, "mlp", 2))
    ]
    for each in reversed(replaced):
        each.undo()
    assert own.forward is given and "forward" not in vars(untouched)


def test_layers_that_view_what_they_are_given():
    """As transformers' Conv1D does, of which GPT-2 is made."""
    torch.manual_seed(2)
    layer, projection, x, labels = Conv1D(4, 4), Conv1D(6, 4), torch.randn(2, 6, 4), torch.zeros(2, 6).long()

    def total(run):
        layer.zero_grad(), projection.zero_grad()
        loss = run(x.clone().requires_grad_())
        loss.backward()
        return [loss, layer.weight.grad.clone(), projection.weight.grad.clone()]

    def summed(logits, labels):
        return nn.functional.cross_entropy(logits.view(-1, 6), labels.view(-1), reduction="sum")

    whole = total(lambda x: summed(projection(layer(x)), labels))
    TiledLayer(layer, "mlp", 3)
    tiles = Tiles(projection, 3)
    for found, expected in zip(total(lambda x: tiles.total(summed, projection(layer(x)), labels)), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_no_effect_under_deepspeeds_own_schedule():
    with pytest.raises(ConfigError, match='"tiled_mlp" in the "pipeline" section does nothing'):
        read_config({"train_batch_size": 1, "pipeline": {"tiled_mlp": 2}})


@pytest.mark.all
def test_memory_of_a_large_vocabulary(ranks):
    (whole, plain, grad), (tiled, least, tiled_grad) = (
        ranks.run(1, tiled_runs.peak, tiles=tiles)[0] for tiles in (None, 16)
    )
    assert tiled == pytest.approx(whole, rel=1e-6)
    assert tiled_grad == pytest.approx(grad, rel=1e-4)
    assert least < plain / 4, (least, plain)
