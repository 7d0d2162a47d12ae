"""TRL's trainers on a pipeline beside TRL's own in one process: losses, norms, metrics."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason='needs pip install "dualpipe_engine[trl]"')

import trl_runs as runs
from dualpipe_engine.integrations.trl import DualPipeDPOTrainer
from dualpipe_engine.integrations.trl.fused import fused
from ranks import RankError

from dualpipe_engine.errors import ConfigError


def assert_same(ours, theirs, steps):
    assert sum("loss" in row for row in theirs) == steps and len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            near = {"abs": 1e-6, "rel": 1e-6}
            if name == "grad_norm":
                near = {"rel": 1e-4}
            elif any(each in name for each in ("logps", "logits", "rewards")):  # sums over the tokens of a row
                near = {"rel": 1e-6, "abs": 1e-5}
            assert found[name] == pytest.approx(value, **near), name


def beside(ranks, tmp_path, run, world, steps, num_chunks=3, **options):
    theirs = ranks.run(1, run, folder=str(tmp_path / "stock"), stock=True, steps=steps, **options)[0]
    ours = ranks.run(world, run, folder=str(tmp_path / "ours"), steps=steps, num_chunks=num_chunks, **options)
    for found in ours:
        assert_same(found, theirs, steps)


def test_fine_tuning_is_that_of_one_process(ranks, tmp_path):
    beside(ranks, tmp_path, runs.sft, world=2, steps=3)


def test_preferences_are_those_of_one_process(ranks, tmp_path):
    beside(ranks, tmp_path, runs.dpo, world=2, steps=3)


PAIRS = {
    "prompt": [f"Question {at}? " for at in range(24)],
    "completion": [f"The answer is {at * at}, {'as ever' * (at % 3)}." for at in range(24)],
}


@pytest.mark.all
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rows": PAIRS},
        {"config": {"loss_type": "dft"}},
        {"config": {"label_smoothing_factor": 0.1}},
        {"config": {"packing": True, "packing_strategy": "wrapped"}},
    ],
    ids=["text", "completions", "dft", "smoothed", "packed"],
)
def test_twenty_steps_on_four_ranks(ranks, tmp_path, given):
    beside(ranks, tmp_path, runs.sft, world=4, steps=20, **given)


@pytest.mark.all
def test_replicas_share_their_metrics(ranks, tmp_path):
    """Each of two pipelines has other rows; what is logged is of both."""
    found = ranks.run(4, runs.sft, folder=str(tmp_path), steps=2, num_chunks=3, num_stages=2, schedule="dualpipev")
    assert all(each == found[0] for each in found)
    assert found[0][0]["mean_token_accuracy"] >= 0 and found[0][1]["num_tokens"] > found[0][0]["num_tokens"] > 200


@pytest.mark.all
@pytest.mark.parametrize(
    "given, num_chunks",
    [({}, 3), ({"config": {"loss_type": ["ipo", "hinge"]}}, 3), ({"config": {"loss_type": ["sft"]}}, 1)],
    ids=["sigmoid", "weighted", "over the batch"],
)
def test_twenty_steps_of_preferences_on_four_ranks(ranks, tmp_path, given, num_chunks):
    beside(ranks, tmp_path, runs.dpo, world=4, steps=20, num_chunks=num_chunks, **given)


@pytest.mark.parametrize(
    "given, match",
    [
        ({"args": None}, "precompute_ref_log_probs"),
        ({"ref_model": torch.nn.Linear(1, 1)}, "ref_model"),
        ({"peft_config": object()}, "PEFT"),
        ({"compute_metrics": dict}, "compute_metrics"),
        ({"loss_type": ["aot"]}, "num_chunks=1"),
        ({"precompute_ref_log_probs": False}, "precompute_ref_log_probs"),
    ],
)
def test_preferences_that_a_pipeline_does_not_have_are_refused(given, match):
    named = {"precompute_ref_log_probs": True, "loss_type": ["sigmoid"]}
    args = SimpleNamespace(**named | {name: given.pop(name) for name in named if name in given})
    with pytest.raises(ConfigError, match=match):
        DualPipeDPOTrainer(torch.nn.Linear(1, 1), **{"args": args} | given)


def test_padding_free_batches_are_refused(ranks, tmp_path):
    with pytest.raises(RankError) as caught:
        ranks.run(2, runs.sft, folder=str(tmp_path), num_chunks=2, config={"padding_free": True, "max_length": None})
    assert all(kind == "ConfigError" and "wrapped" in text for kind, text, _ in caught.value.errors.values())


def test_the_fused_head_is_that_of_trl():
    from trl.trainer.utils import add_fused_lm_head

    model = runs.make_model(37)
    tokens = torch.randint(0, 37, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = tokens.masked_fill(tokens % 3 == 0, -100)
    found = fused(model(input_ids=tokens).logits, labels)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    expected = model(input_ids=tokens, labels=labels, fused_lm_head=True)
    for name in set(expected) - {"loss"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
