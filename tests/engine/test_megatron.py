"""Jobs in the shape of GPT-NeoX and Megatron-DeepSpeed change one name, and train as under stock DeepSpeed."""

from __future__ import annotations

import megatron_runs
import pytest

JOBS = {
    "two lengths": {"steps": 3, "lengths": (3, 3, 6)},
    "recomputed": {"steps": 2, "interval": 1},
    "soft prompt": {"steps": 2, "prompt": True},
}
ALL = pytest.mark.all


def same(found, expected):
    for rank in found:
        for name in ("losses", "rates", "norms"):
            assert rank[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("schedule", ["dualpipe", pytest.param("zbv", marks=ALL), pytest.param("1f1b", marks=ALL)])
def test_trains_like_stock(ranks, tmp_path, schedule, job):
    stock, *_, last = ranks.run(2, megatron_runs.train, folder=str(tmp_path), schedule=None, **JOBS[job])
    found = ranks.run(2, megatron_runs.train, folder=str(tmp_path), schedule=schedule, **JOBS[job])
    same(found, stock)
    loss, logits = next(rank["evaluated"] for rank in found if rank["evaluated"][1] is not None)
    assert (loss, logits) == pytest.approx(last["evaluated"], rel=1e-5)


def test_resumes_with_all_that_the_job_has_saved(ranks, tmp_path):
    job = {"folder": str(tmp_path), "schedule": "dualpipe", "steps": 4}
    whole = ranks.run(2, megatron_runs.train, save_at=2, **job)
    resumed = ranks.run(2, megatron_runs.train, load=True, **job)
    for before, after in zip(whole, resumed, strict=True):
        assert after["losses"] == before["losses"][2:] and after["rates"] == before["rates"][2:]
        assert after["evaluated"] == before["evaluated"]
