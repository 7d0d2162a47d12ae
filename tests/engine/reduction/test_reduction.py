"""Reductions run under the tail of the schedule, and change nothing in the training."""

from __future__ import annotations

import pytest
import torch
import training
import zero_runs

SETTINGS = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16")]


@pytest.mark.parametrize(("zero", "precision"), SETTINGS)
@pytest.mark.parametrize(("pp", "micros"), [(2, 1), (4, 3), (4, 8), (4, 11)])
def test_same_training_as_reducing_after_the_schedule(ranks, pp, micros, zero, precision):
    """Bit for bit: two copies are added up in either way."""
    config = training.settings(micros, 1, zero, precision, "dualpipe")
    found = ranks.run(pp, zero_runs.both_ways, config=config, ranks=pp)
    for rank in found:
        tail, after = rank["tail"], rank["after"]
        assert after["kind"] == "AfterSchedule" != tail["kind"]
        if (precision, micros) == ("bf16", 1):
            continue  # there DeepSpeed's norm forgets the rank without a backward
        assert tail["losses"] == after["losses"]
        for name, value in tail["weights"].items():
            assert torch.equal(value, after["weights"][name]), name


@pytest.mark.parametrize(("schedule", "zero"), [("dualpipe", 0), ("dualpipe", 1), ("zb1p", 0), ("zb1p", 1)])
def test_with_replicas(ranks, schedule, zero):
    config = training.settings(3, 2, zero, "fp32", schedule)
    for rank in ranks.run(4, zero_runs.both_ways, config=config, ranks=2, replicas=2):
        assert rank["tail"]["losses"] == pytest.approx(rank["after"]["losses"], rel=1e-6)
        for name, value in rank["tail"]["weights"].items():
            torch.testing.assert_close(value, rank["after"]["weights"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_tied_across_ranks_stay_equal(ranks, precision):
    config = training.settings(3, 1, 1, precision, "1f1b")
    found = ranks.run(4, zero_runs.both_ways, config=config, ranks=4)
    copies = [value for rank in found for name, value in rank["tail"]["weights"].items() if "tied" in name]
    assert len(copies) == 2
    assert torch.equal(*copies)


@pytest.mark.parametrize("micros", [3, 8])
def test_a_stage_is_reduced_before_the_schedule_ends(ranks, micros):
    """REDUCE stands in the trace; the stage that is done first is reduced before the other's last gradient is there."""
    config = training.settings(micros, 1, 1, "fp32", "dualpipe")
    found = ranks.run(4, zero_runs.watched, config=config, ranks=4)
    orders = []
    for rank in found:
        assert [op[-6:] for op in rank["tail"]] == ["REDUCE", "REDUCE", "STEP"]
        names = [name for name, _ in rank["log"]]
        orders.append([stage for name, stage in rank["log"] if name == "reduce"])
        assert rank["left"] == 0
        assert names.count("reduce") == 2
    assert [orders[0], orders[1]] == [orders[3], orders[2]], "twins issue their collectives in one order"
    early = [[name for name, _ in rank["log"]].index("reduce") < len(rank["log"]) - 2 for rank in found]
    assert any(early)
