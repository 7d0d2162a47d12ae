"""NaN or inf is reported with stage, direction and micro-batch; a loss scaler's overflow is not."""

from __future__ import annotations

import re

import finite_runs
import pytest

WHERE = {
    "data": r"stage 0 \(rank 3\), forward, micro-batch 5: inf in the data",
    "forward": r"stage 1 \(rank 2\), forward, micro-batch 5: NaN in the output of the stage",
    "loss": r"stage 3 \(rank 0\), forward, micro-batch 5: the loss is NaN",
    "backward": r"stage 1 \(rank 2\), backward, micro-batch 5: inf in the gradient of the stage's input",
    "weight": r"stage 1 \(rank 2\), backward, micro-batch 5: inf in a weight gradient of the stage",
}


def only_warning(found):
    """Of rank 0; the others are silent."""
    assert all(each["error"] is None for each in found)
    assert [len(each["warnings"]) for each in found] == [1, 0, 0, 0], found
    return found[0]["warnings"][0]


@pytest.mark.parametrize(
    ("poison", "options"),
    [
        ("data", {}),
        ("forward", {"zero": 0}),
        ("loss", {"precision": "bf16"}),
        ("backward", {"precision": "bf16", "zero": 0}),
    ],
)
def test_one_warning_names_the_origin(ranks, poison, options):
    text = only_warning(ranks.run(4, finite_runs.poisoned, timeout=60, poison=poison, **options))
    assert re.search(f"^NaN or inf in step 2: {WHERE[poison]}", text), text
    assert "more micro-batches" not in text
    assert text.count("micro-batch") == 1, text


@pytest.mark.parametrize("poison", ["forward", "backward", "weight"])
def test_the_strict_check_ends_all_ranks_before_the_step(ranks, poison):
    found = ranks.run(4, finite_runs.poisoned, timeout=60, poison=poison, check_finite=True)
    for each in found:
        name, text = each["error"]
        assert name == "PipelineRuntimeError"
        assert re.search(WHERE[poison], text), text
        assert each["kept"]
        assert not each["warnings"]


def test_a_weight_gradient_shows_in_the_norm(ranks):
    text = only_warning(ranks.run(4, finite_runs.poisoned, timeout=60, poison="weight"))
    assert "step 2: the gradient norm is NaN or inf" in text
    assert "check_finite" in text


def test_the_replica_is_named(ranks):
    text = only_warning(ranks.run(4, finite_runs.poisoned, timeout=60, poison="forward", ranks=2))
    assert "stage 0 (rank 2), forward, micro-batch 5 of replica 0: NaN" in text


def test_overflow_under_a_loss_scale_is_silent(ranks):
    found = ranks.run(4, finite_runs.poisoned, timeout=60, poison="backward", precision="fp16", check_finite=True)
    assert all(each == {"warnings": [], "error": None, "kept": True, "skipped": 1} for each in found), found


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_is_said_about_a_good_batch(ranks, strict):
    found = ranks.run(4, finite_runs.poisoned, timeout=60, poison=None, schedule="zbv", check_finite=strict)
    assert all(not each["warnings"] and each["error"] is None and not each["kept"] for each in found), found
