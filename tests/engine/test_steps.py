"""Batches that add up gradients, and the step as a call of its own."""

from __future__ import annotations

import pytest
import steps_runs as runs
import torch


def test_two_batches_and_a_step_are_one_batch(ranks):
    for found in ranks.run(2, runs.all_cases):
        for case in runs.CASES:
            losses, norm, weights, steps = found[case, "whole"]
            rough = {"rtol": 2e-2, "atol": 2e-2} if case in ("bf16", "fp16") else {"rtol": 1e-5, "atol": 1e-6}
            for how in ("told", "late"):
                other = found[case, how]
                assert other[0] == pytest.approx(losses, rel=rough["rtol"]), (case, how)
                assert other[1] == pytest.approx(norm, rel=5 * rough["rtol"]), (case, how)
                assert other[3] == steps == 2
                for name, value in weights.items():
                    torch.testing.assert_close(other[2][name], value, **rough)
            told, late = found[case, "told"][2], found[case, "late"][2]
            assert all(torch.equal(late[name], value) for name, value in told.items())


def test_steps_without_gradients_are_refused(ranks):
    for said, same, steps in ranks.run(2, runs.refusals):
        starts = [
            "take_step() has no gradients",
            "1 batches of forward_backward() wait",
            "take_step() has no gradients",
        ]
        starts += ["take_step() has no gradients"] * 2
        starts += ["ZeRO-2 reduces after every B and W", "take_step() has no gradients"]
        assert [start in text for start, text in zip(starts, said, strict=True)] == [True] * 7, said
        assert same
        assert steps == 1
