"""What all ranks raise at one place ends as their own error, and the job goes on."""

from __future__ import annotations

import alike_runs


def test_ranks_compare_their_errors(ranks):
    assert ranks.run(2, alike_runs.compared, timeout=60) == [{"alike": True, "elsewhere": False, "alone": False}] * 2


def test_what_deepspeed_asserts_is_no_lost_rank(ranks):
    for errors, loss in ranks.run(2, alike_runs.refused_by_deepspeed, timeout=60):
        assert errors["untested"] == ("AssertionError", errors["untested"][1])
        assert errors["untested"][1].startswith("You are using an untested ZeRO Optimizer")
        assert errors["unsupported"] == ("AssertionError", "OneBitAdam is not a supported DeepSpeed Optimizer")
        assert errors["argument"][0] == "TypeError" and "learning_rate" in errors["argument"][1]
        assert loss > 0
