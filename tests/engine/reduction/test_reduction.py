"""Reductions run under the tail of the schedule, and change nothing in the training."""

from __future__ import annotations

import pytest
import torch
import training
import zero_runs

#: name -> pipeline ranks, micro-batches, replicas, ZeRO stage, precision, schedule
CASES = {
    f"{pp} x {micros}, ZeRO-{zero}, {precision}": (pp, micros, 1, zero, precision, "dualpipe")
    for pp, micros, settings in (
        (2, 1, [(0, "fp32"), (1, "fp32"), (1, "bf16")]),
        (4, 3, [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16")]),
        (4, 8, [(0, "bf16"), (1, "fp32")]),
        (4, 11, [(0, "fp32"), (1, "bf16")]),
    )
    for zero, precision in settings
}
MORE = [
    name for name in CASES if name.startswith(("4 x 11", "4 x 8, ZeRO-1", "4 x 3, ZeRO-0, bf16", "4 x 3, ZeRO-1, fp32"))
]  #: --all
REPLICAS = {
    f"replicas of {schedule}, ZeRO-{zero}": (2, 3, 2, zero, "fp32", schedule)
    for schedule in ("dualpipe", "zb1p")
    for zero in (0, 1)
}
TIED = {f"tied across ranks, {precision}": (4, 3, 1, 1, precision, "1f1b") for precision in ("fp32", "bf16")}


def given(pp, micros, replicas, zero, precision, schedule):
    return {"config": training.settings(micros, replicas, zero, precision, schedule), "ranks": pp, "replicas": replicas}


@pytest.fixture(scope="module")
def both(ranks):
    """The trainings under the tail and after the schedule, by rank; cases on as many ranks share a start (not MORE)."""
    runs, every = {}, CASES | REPLICAS | TIED

    def of(name):
        start = every[name][0] * every[name][2], name in MORE
        if start not in runs:
            shared = {each: case for each, case in every.items() if (case[0] * case[2], each in MORE) == start}
            cases = {each: given(*case) for each, case in shared.items()}
            runs[start] = ranks.run(start[0], training.each, call=zero_runs.both_ways, cases=cases)
        return [rank[name] for rank in runs[start]]

    return of


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.all] * (name in MORE)) for name in CASES])
def test_same_training_as_reducing_after_the_schedule(both, name):
    """Bit for bit: two copies are added up in either way."""
    _, micros, *_, precision, _ = CASES[name]
    for rank in both(name):
        tail, after = rank["tail"], rank["after"]
        assert after["kind"] == "AfterSchedule" != tail["kind"]
        if (precision, micros) == ("bf16", 1):
            continue  # there DeepSpeed's norm forgets the rank without a backward
        assert tail["losses"] == after["losses"]
        for key, value in tail["weights"].items():
            assert torch.equal(value, after["weights"][key]), key


@pytest.mark.parametrize("name", REPLICAS)
def test_with_replicas(both, name):
    for rank in both(name):
        assert rank["tail"]["losses"] == pytest.approx(rank["after"]["losses"], rel=1e-6)
        for key, value in rank["tail"]["weights"].items():
            torch.testing.assert_close(value, rank["after"]["weights"][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TIED)
def test_weights_tied_across_ranks_stay_equal(both, name):
    copies = [value for rank in both(name) for key, value in rank["tail"]["weights"].items() if "tied" in key]
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
