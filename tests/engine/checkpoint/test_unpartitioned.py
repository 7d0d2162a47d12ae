"""The optimizer's state without ZeRO: it resumes, moves to other ranks, and from and to ZeRO."""

from __future__ import annotations

import checkpoint_runs as runs
import pytest
import torch
import training

from dualpipe_engine.engine.checkpoint.convert import whole_states
from dualpipe_engine.engine.checkpoint.unpartitioned import by_name, experts_of, file_of_experts, with_experts
from dualpipe_engine.errors import CheckpointError


def config(schedule, zero=0, precision="fp32", **sections):
    return training.settings(4, 1, zero, precision, schedule) | sections


def chain(folder, links):
    """An uninterrupted run under the first schedule, then links of (schedule, ZeRO stage) with a step each."""
    found = [{"config": config(*links[0]), "steps": len(links)}]
    for number, link in enumerate(links):
        universal = {"checkpoint": {"load_universal": True}} if number else {}
        job = {"config": config(*link, **universal), "steps": 1, "skip": number}
        job |= {"load": f"{number - 1}u"} if number else {}
        found.append(job | ({"save": str(number), "ours": True} if number < len(links) - 1 else {}))
    return [{"ranks": 2, "folder": str(folder)} | each for each in found]


@pytest.mark.parametrize(
    "links",
    [
        [("dualpipe", 0), ("zb1p", 0), ("dualpipe", 1)],
        pytest.param([("zbv", 1), ("1f1b", 0), ("dualpipe", 0), ("zb1p", 2)], marks=pytest.mark.all),
        pytest.param([("1f1b", 0, "bf16"), ("dualpipe", 0, "bf16"), ("dualpipe", 1)], marks=pytest.mark.all),
    ],
)
def test_the_state_moves(ranks, tmp_path, links):
    straight, *parts = ranks.run(2, runs.hops, links=chain(tmp_path, links))[0]
    limit = 2e-2 if len(links[0]) == 3 else 1e-6
    assert [part["losses"][0] for part in parts] == pytest.approx(straight["losses"], rel=limit)
    assert len(set(straight["losses"])) == len(links)


def test_zero_and_no_zero_are_told_apart(ranks, tmp_path):
    jobs = [{"config": config("dualpipe", zero), "ranks": 2, "folder": str(tmp_path)} for zero in (0, 1)]
    ranks.run(2, runs.hops, links=[job | {"save": str(zero)} for zero, job in enumerate(jobs)])
    cases = {"into ZeRO": jobs[1] | {"load": "0"}, "into none": jobs[0] | {"load": "1"}}
    for rank in ranks.run(2, training.refusals, call=runs.hop, cases=cases):
        for name, word in (("into ZeRO", "saved without ZeRO"), ("into none", "saved with ZeRO")):
            kind, message = rank[name]
            assert kind == "OtherRanksError" and word in message and "dualpipe convert" in message


def test_a_file_holds_the_experts_of_ranks_with_the_same():
    shares = {"one": (1, 2), "two": (0, 3), "three": None}
    assert [file_of_experts(shares, replica) for replica in range(7)] == [0, 1, 2, 3, 4, 5, 0]
    assert file_of_experts({}, 5) == 0


def test_experts_are_taken_out_and_put_back():
    layout = [[("a", torch.Size([2])), ("e", torch.Size([2]))], [(None, torch.Size([1])), ("f", torch.Size([2]))]]
    groups = [{"params": [0, 1]}, {"params": [2, 3]}]

    def state(value):
        return {"state": {n: {"sum": value, "none": None} for n in (0, 1, 2, 3)}, "param_groups": groups}

    experts = experts_of(state(5), layout, {"e", "f"})
    assert dict(by_name(experts, layout)) == {"e": {"sum": 5}, "f": {"sum": 5}}
    joined = dict(by_name(with_experts(state(3), experts), layout))
    assert joined == {"a": {"sum": 3}, "e": {"sum": 5}, "f": {"sum": 5}}


def test_states_of_experts_that_cannot_be_joined_are_refused():
    rows = {"row": torch.zeros(4), "step": torch.tensor(1.0)}
    shape = torch.Size([2, 4])
    assert whole_states("e", [rows], shape) == rows
    with pytest.raises(CheckpointError, match="cannot be joined"):
        whole_states("e", [rows, rows], shape)
    pair = [{"sum": torch.full(shape, value)} for value in (1.0, 2.0)]
    assert whole_states("e", pair, shape)["sum"].tolist() == [[1.0] * 4] * 2 + [[2.0] * 4] * 2
