"""Replicas that share sequences, against one process that has whole sequences."""

from __future__ import annotations

import json
from functools import partial

import pytest
import sequence_runs as runs
import test_moe
import torch
import transformers
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llama import modeling_llama

from dualpipe_engine.adapters.losses import TokenLoss
from dualpipe_engine.engine.batches.shards import IGNORED, Shards, of_shards, shifts
from dualpipe_engine.engine.checks.token_mixing import mixing_modules
from dualpipe_engine.engine.placing.param_groups import PLACEHOLDER
from dualpipe_engine.errors import ConfigError
from dualpipe_engine.models.transformer import layers, loss

LATENT = {"heads": 4, "q_rank": 6}
GROUPED = {"attention": "grouped", "heads": 4, "kv_heads": 1, "dense_blocks": 1}
BATCH_LOSS = {"balancing": "loss", "loss_weight": 0.5}
SEQUENCE_LOSS = {"sequence_loss": 0.5}
CASES = [
    {"model": LATENT | BATCH_LOSS, "schedule": "dualpipe", "size": 2},
    {"model": GROUPED, "schedule": "dualpipev", "size": 2, "pipeline": {"tiled_loss": 3, "tiled_mlp": 2}},
    {"model": LATENT | SEQUENCE_LOSS, "schedule": "zb1p", "size": 2, "pipeline": {"overlap": False}},
]


def whole(model, start, readers, evaluate=False):
    """The oracle: loss and gradients of the whole model on whole sequences."""
    module = nn.Sequential(
        *[spec.build() for spec in layers(test_moe.moe_runs.config(**model | {"expert_parallel": 1}))]
    ).double()
    module.load_state_dict(start, strict=False)
    module.train(not evaluate)
    total = 0.0
    for reader in (7,) if evaluate else range(readers):
        data = runs.stream(reader)
        for _ in range(runs.MICROS):
            inputs, labels = next(data)
            each = loss(module(inputs), labels) / (runs.MICROS * (1 if evaluate else readers))
            each.backward()
            total += float(each.detach())
    return total, {name: param.grad for name, param in module.named_parameters()}


def check(found, case):
    size, replicas = case["size"], case.get("replicas", 2)
    readers = replicas // size
    start = {name: copies[0] for name, copies in test_moe.assemble(found, "start").items()}
    total, grads = whole(case["model"], start, readers)
    evaluated, _ = whole(case["model"], start, readers, evaluate=True)
    for rank in found:
        assert rank["loss"] == pytest.approx(total, rel=1e-6)  # reported in fp32
        assert rank["evaluated"] == pytest.approx(evaluated, rel=1e-6)
        # Each exchange of a block, forward and backward, as a phase; without overlap within the layer.
        by_phases = case.get("pipeline", {}).get("overlap") is not False
        assert (rank["transfers"]["heads"] > 0) == by_phases == (rank["transfers"]["tokens"] > 0)
        assert rank["reader"] == (rank["replica"] // size, readers, 2 * runs.MICROS * readers)
    seen = test_moe.assemble(found, "grads")
    seen.pop(PLACEHOLDER, None)  # of ranks without experts
    assert set(seen) == set(grads)
    for name, copies in seen.items():
        for copy in copies:
            torch.testing.assert_close(copy, grads[name], rtol=1e-10, atol=1e-10, msg=name)


def test_gradients_are_those_of_whole_sequences(ranks):
    found = ranks.run(4, runs.gradients, cases=CASES)
    for number, case in enumerate(CASES):
        check([rank[number] for rank in found], case)


def check_auto(found, model):
    start = {name: copies[0] for name, copies in test_moe.assemble(found, "start").items()}
    total, _ = whole(model, start, 1)
    for rank in found:
        assert rank["loss"] == pytest.approx(total, rel=1e-6)
    assert len({rank["schedule"] for rank in found}) == 1 and found[0]["schedule"] != "auto"


@pytest.mark.parametrize("model", [GROUPED, pytest.param(LATENT, marks=pytest.mark.all)])
def test_auto_measures_parts(ranks, tmp_path, model):
    """Once: another start takes what it has found, without data."""
    costs = tmp_path / "costs.json"
    found = ranks.run(4, runs.auto, path=costs, **model)
    check_auto(found, model)
    assert all(rank["measured"] for rank in found)
    job = json.loads(costs.read_text())["job"]
    assert job["replicas that share each sequence"] == "2"
    again = ranks.run(4, runs.auto, path=costs, data=False, **model)
    check_auto(again, model)
    assert not any(rank["measured"] for rank in again)


@pytest.mark.all
def test_on_more_ranks(ranks):
    """Four parts; two groups of two."""
    cases = [
        {"model": model, "schedule": schedule, "size": size, "replicas": 4}
        for model, schedule, size in (
            (LATENT, "dualpipe", 4),
            (GROUPED | {"kv_heads": 2}, "dualpipe", 4),
            (GROUPED, "zb1p", 4),
            (LATENT, "dualpipev", 2),
        )
    ]
    found = ranks.run(8, runs.gradients, cases=cases, timeout=300)
    for number, case in enumerate(cases):
        check([rank[number] for rank in found], case)


@pytest.mark.all
def test_training_and_checkpoints_are_those_of_another_size(ranks, tmp_path):
    ways = [(1, None), (2, None), (1, (1, 2))]
    found = ranks.run(4, runs.train, folder=str(tmp_path), steps=10, ways=ways)
    for rank in found:
        for losses in rank[1:]:
            assert losses == pytest.approx(rank[0], rel=1e-5)


WAYS = [
    {"schedule": "dualpipe", "zero": 2},
    {"schedule": "zb1p", "zero": 1, "precision": "bf16"},
    {"schedule": "dualpipev", "zero": 2, "precision": "bf16"},
    {"schedule": "dualpipe", "pipeline": {"recompute": True}},
    {"schedule": "dualpipe", "pipeline": {"activation_checkpoint_interval": 1}},
    {"schedule": "zb1p", "model": {"expert_parallel": 2}},
    {"schedule": "dualpipev", "pipeline": {"offload_activations": True}},
    {"schedule": "zbv", "zero": 2, "pipeline": {"recompute": True, "offload_activations": True}},
]


@pytest.mark.all
def test_training_with_other_options_is_that_of_whole_sequences(ranks):
    found = ranks.run(4, runs.losses, ways=WAYS, timeout=300)
    for rank in found:
        for way, (whole_losses, part_losses) in zip(WAYS, rank, strict=True):
            assert part_losses == pytest.approx(whole_losses, rel=2e-3 if "precision" in way else 1e-5), way


def test_losses_that_are_modules(ranks, tmp_path):
    for rank in ranks.run(4, runs.loss_modules, folder=str(tmp_path)):
        (whole, weight), (parts, weight_of_parts), (tiled, _) = rank
        assert parts == pytest.approx(whole, rel=1e-5) and tiled == pytest.approx(whole[:1], rel=1e-5)
        assert weight_of_parts == pytest.approx(weight, rel=1e-5) and weight != 1


def test_what_cannot_work_is_refused(ranks):
    ranks.run(4, runs.refusals)


def test_calls_of_attention_that_does_not_know_parts_are_refused(ranks):
    ranks.run(4, runs.calls_of_attention)


def test_modules_that_mix_tokens():
    llama = transformers.LlamaConfig(hidden_size=8, num_attention_heads=2)
    for kind, part in (
        ("MultiheadAttention", nn.MultiheadAttention(8, 2)),
        ("GRU", nn.GRU(8, 8)),
        ("Conv1d", nn.Conv1d(8, 8, 3)),
        ("LlamaAttention", modeling_llama.LlamaAttention(llama, 0)),
    ):
        assert mixing_modules(nn.Sequential(nn.Linear(8, 8), nn.Sequential(part))) == [kind]
        knows = runs.Knowing()
        knows.part = part
        assert mixing_modules(nn.Sequential(knows)) == []
    assert mixing_modules(nn.Sequential(modeling_llama.LlamaMLP(llama), nn.Conv1d(8, 8, 1))) == []


def test_replicas_of_a_sequence_read_the_same(ranks):
    ranks.run(4, runs.other_data)
    found = ranks.run(4, runs.loader)
    assert len(set(found)) == 1 and found[0][1] == 2 * runs.MICROS


def test_parts_add_up_to_the_mean():
    """Also where all labels that count are in one part."""
    logits, labels = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    labels[:, 1:] = IGNORED
    mean = of_shards(lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten()))
    parts = [Shards(3, rank).cut(logits, labels) for rank in range(3)]
    assert [tuple(out.shape) for out, _ in parts] == [(2, 2, 5)] * 3
    found = sum(mean(*part) for part in parts) / 3
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def token_loss(out, labels, **options):
    return nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten(), **options)


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ({"label_smoothing": 0.2}, True),
        ({"reduction": "sum"}, False),
        ({"ignore_index": 0}, False),
        ({"weight": torch.arange(1.0, 6.0)}, False),
    ],
)
def test_a_loss_of_parts_is_a_mean_or_refused(options, mean):
    torch.manual_seed(4)
    logits, labels = torch.randn(2, 8, 5), torch.randint(0, 5, (2, 8))
    loss_fn = partial(token_loss, **options)
    of_part = of_shards(loss_fn)
    parts = [Shards(2, rank).cut(logits, labels) for rank in range(2)]
    if mean:
        torch.testing.assert_close(sum(of_part(*part) for part in parts) / 2, loss_fn(logits, labels))
    else:
        with pytest.raises(ConfigError, match="not the mean over these"):
            [of_part(*part) for part in parts]


def test_labels_are_shifted_before_they_are_cut():
    """No token at a border is lost; a loss that is given some of its arguments before is the same loss."""
    logits, tokens = torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))
    own = partial(TokenLoss(ForCausalLMLoss, 5))
    assert shifts(own) and not shifts(nn.functional.cross_entropy)
    parts = [Shards(3, rank, inputs=False, shifts=True).cut(logits, tokens) for rank in range(3)]
    assert all(inputs is logits for inputs, _ in parts)
    mine = [part.contiguous() for part in logits.chunk(3, dim=1)]
    found = sum(of_shards(own)(part, shard) for part, (_, shard) in zip(mine, parts, strict=True)) / 3
    torch.testing.assert_close(found, own(logits, tokens))


@pytest.mark.parametrize(
    ("inputs", "labels", "text"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.long), "pad them to a multiple of 2"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), "one label for each token"),
        (torch.zeros(2, 6), torch.zeros(2, 4, dtype=torch.long), "cannot be cut with labels of 4"),
    ],
)
def test_what_cannot_be_cut(inputs, labels, text):
    with pytest.raises(ConfigError, match=text):
        Shards(2, 0).cut(inputs, labels)
