"""TRL's trainers on a pipeline beside TRL's own in one process: losses, norms, metrics."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason='needs pip install "dualpipe_engine[trl]"')

import trl_runs as runs
from dualpipe_engine.integrations.trl.fused import fused
from ranks import RankError


def assert_same(ours, theirs, steps):
    assert sum("loss" in row for row in theirs) == steps and len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-6, rel=1e-4 if name == "grad_norm" else 0), name


def beside(ranks, tmp_path, run, world, steps, num_chunks=3, **options):
    theirs = ranks.run(1, run, folder=str(tmp_path / "stock"), stock=True, steps=steps, **options)[0]
    ours = ranks.run(world, run, folder=str(tmp_path / "ours"), steps=steps, num_chunks=num_chunks, **options)
    for found in ours:
        assert_same(found, theirs, steps)


def test_fine_tuning_is_that_of_one_process(ranks, tmp_path):
    beside(ranks, tmp_path, runs.sft, world=2, steps=3)


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
