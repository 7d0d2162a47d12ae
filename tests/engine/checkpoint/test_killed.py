"""Killed at any moment of a save in the background: the last complete checkpoint loads, bit by bit."""

from __future__ import annotations

import random
import re

import killed_runs as runs
import pytest
from ranks import RankError


def check(found, weights, tags):
    """What was loaded is one of the two saves, and so are its weights and those of the next step; its step."""
    tag, step, loaded, later, there = found
    assert re.fullmatch(rf"{tags[step]}(\.[0-9a-f]{{8}}\.replaced)?", tag)
    assert loaded == weights[step] and later == weights[step + 1]
    assert {"next"} < set(there) <= {"next", *tags}, there
    return step


@pytest.mark.all
@pytest.mark.parametrize("tags", [("same", "same"), ("first", "second")], ids=" ".join)
def test_what_stands_at_any_moment_loads(ranks, tmp_path, tags):
    folder, pictures = tmp_path / "run", tmp_path / "pictures"
    pictures.mkdir()
    weights = ranks.run(2, runs.pictured, folder=str(folder), pictures=str(pictures), tags=tags)
    moments = sorted(map(str, pictures.iterdir()))
    steps = []
    for rank, found in enumerate(ranks.run(2, runs.resumed, folders=moments)):
        steps.append([check(each, weights[rank], tags) for each in found])
    assert steps[0] == steps[1] == sorted(steps[0]) and set(steps[0]) == {0, 1}


def check_killed(ranks, folder, **job):
    """Ranks are killed for good here; those that are left end, too."""
    folder.mkdir()
    weights = ranks.run(2, runs.uninterrupted)
    with pytest.raises(RankError) as caught:
        ranks.run(2, runs.killed, timeout=60, folder=str(folder), **job)
    assert all(caught.value.errors[rank][0] == "Died" for rank in job["victims"]), caught.value
    found = ranks.run(2, runs.resumed, folders=[str(folder)])
    steps = [check(each, weights[rank], ("first", "second")) for rank, (each,) in enumerate(found)]
    assert steps[0] == steps[1]


@pytest.mark.faults_all
def test_killed_within_a_file(ranks, tmp_path):
    """By the kernel, at a byte drawn by chance."""
    check_killed(ranks, tmp_path / "run", victims=[1], moment=0.0, size=random.Random(7).random())


@pytest.mark.all
@pytest.mark.faults_all
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1), (1, 0)])
@pytest.mark.parametrize("draw", range(5))
def test_killed_at_any_moment(ranks, tmp_path, draw, victims):
    """At a line drawn by chance in the first of the victims, in each fifth of the save."""
    moment = (draw + random.Random(str((draw, victims))).random()) / 5
    check_killed(ranks, tmp_path / "run", victims=victims, moment=moment, size=None)


@pytest.mark.all
@pytest.mark.faults_all
@pytest.mark.parametrize("victims", [(0,), (1,)])
@pytest.mark.parametrize("draw", range(3))
def test_killed_within_any_file(ranks, tmp_path, draw, victims):
    size = random.Random(str((draw, victims))).random()
    check_killed(ranks, tmp_path / "run", victims=victims, moment=0.0, size=size)
