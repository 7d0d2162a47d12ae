"""Checkpoints of the loop placement: to and from every other one, and to other numbers of stages a rank."""

from __future__ import annotations

import itertools

import checkpoint_runs as runs
import pytest
import training

CHAINS = {
    "few": [None, ("interleaved", 2), "dualpipe"],
    "every placement": [
        *(("interleaved_zb", 3), "dualpipev", ("interleaved", 1), "1f1b", ("interleaved", 2), "dualpipe"),
        *(("interleaved_zb", 2), None, ("interleaved", 3)),
    ],
}


@pytest.mark.parametrize("name", ["few", pytest.param("every placement", marks=pytest.mark.all)])
def test_weights_move(ranks, tmp_path, name):
    links = []
    for number, each in enumerate(CHAINS[name]):
        schedule, stages = each if isinstance(each, tuple) else (each, None)
        keys = {} if stages is None else {"stages_per_rank": stages}
        job = {"config": training.settings(4, 1, 1, "fp32", schedule, **keys), "ranks": 2, "folder": str(tmp_path)}
        load = {"load": str(number - 1), "load_optimizer_states": False} if number else {}
        links.append({"save": str(number), "steps": int(number < 2), **job, **load})
    found = ranks.run(2, runs.hops, links=links)[0]
    for before, link in itertools.pairwise(found):
        assert link["before"] == pytest.approx(before["after"], rel=1e-6)
    assert len({link["after"] for link in found}) >= 2, "trained"
