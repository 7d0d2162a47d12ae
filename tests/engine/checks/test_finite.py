"""NaN or inf is reported with stage, direction and micro-batch; a loss scaler's overflow is not."""

from __future__ import annotations

import re

import finite_runs
import pytest
import training

WHERE = {
    "data": r"stage 0 \(rank 3\), forward, micro-batch 5: inf in the data",
    "forward": r"stage 1 \(rank 2\), forward, micro-batch 5: NaN in the output of the stage",
    "loss": r"stage 3 \(rank 0\), forward, micro-batch 5: the loss is NaN",
    "backward": r"stage 1 \(rank 2\), backward, micro-batch 5: inf in the gradient of the stage's input",
    "weight": r"stage 1 \(rank 2\), backward, micro-batch 5: inf in a weight gradient of the stage",
}


#: name -> what `finite_runs.poisoned` is given
WARNED = {
    "data": {"poison": "data"},
    "forward": {"poison": "forward", "zero": 0},
    "loss": {"poison": "loss", "precision": "bf16"},
    "backward": {"poison": "backward", "precision": "bf16", "zero": 0},
    "weight": {"poison": "weight"},
    "replica": {"poison": "forward", "ranks": 2},
    "overflow": {"poison": "backward", "precision": "fp16", "check_finite": True},
    "good": {"poison": None, "schedule": "zbv"},
    "good, strict": {"poison": None, "schedule": "zbv", "check_finite": True},
}


@pytest.fixture(scope="module")
def poisoned(ranks):
    """Rank by rank what a case of `WARNED`, which ends no rank, comes to."""
    found = ranks.run(4, training.each, call=finite_runs.poisoned, cases=WARNED)
    return lambda name: [rank[name] for rank in found]


def only_warning(found):
    """Of rank 0; the others are silent."""
    assert all(each["error"] is None for each in found)
    assert [len(each["warnings"]) for each in found] == [1, 0, 0, 0], found
    return found[0]["warnings"][0]


@pytest.mark.parametrize("poison", ["data", "forward", "loss", "backward"])
def test_one_warning_names_the_origin(poisoned, poison):
    text = only_warning(poisoned(poison))
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


def test_a_weight_gradient_shows_in_the_norm(poisoned):
    text = only_warning(poisoned("weight"))
    assert "step 2: the gradient norm is NaN or inf" in text
    assert "check_finite" in text


def test_the_replica_is_named(poisoned):
    text = only_warning(poisoned("replica"))
    assert "stage 0 (rank 2), forward, micro-batch 5 of replica 0: NaN" in text


def test_overflow_under_a_loss_scale_is_silent(poisoned):
    found = poisoned("overflow")
    assert all(each == {"warnings": [], "error": None, "kept": True, "skipped": 1} for each in found), found


@pytest.mark.parametrize("name", ["good", "good, strict"])
def test_nothing_is_said_about_a_good_batch(poisoned, name):
    found = poisoned(name)
    assert all(not each["warnings"] and each["error"] is None and not each["kept"] for each in found), found
