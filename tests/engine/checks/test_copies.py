"""Copies of parameters that drift apart are noticed, and named."""

from __future__ import annotations

import pytest
import torch
import training
from ranks import RankError


def drift(change):
    import dualpipe_engine

    config = training.settings(4, schedule="dualpipe", check_twins=2)
    engine, *_ = dualpipe_engine.initialize(model=training.make_module(4, 4), config=config)
    data = training.stream(0)
    engine.train_batch(data)
    if change:
        engine.optimizer.step = lambda *_, **__: None  # which would write the weights anew
    if change and engine.global_rank == 3:
        with torch.no_grad():
            engine.module.get_submodule("2").up.bias[0] += 1e-4
    engine.train_batch(data)
    return engine.global_steps


def test_a_changed_copy_is_named(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(4, drift, timeout=60, change=True)
    text = "the copies of parameter 2.up.bias have drifted apart"
    assert {text in caught.value.errors[rank][1] for rank in (0, 3)} == {True}
    assert all(error[0] == "PipelineRuntimeError" for error in caught.value.errors.values())


def test_same_copies_pass(ranks):
    assert ranks.run(4, drift, timeout=60, change=False) == [2] * 4
