"""Op text, Placement, Plan and its files."""

from __future__ import annotations

import json

import pytest

from dualpipe_engine.errors import PlanError
from dualpipe_engine.schedule.op import Op, pair
from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.placement import BIDIRECTIONAL, LINEAR, VEE, Placement
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.make_plan import make_plan


@pytest.mark.parametrize(
    "text", ["3F7", "4B2", "4I2", "4W2", "(3F7;4B2)FB", "(3F7;4I2)FB", "3SEND_F7", "0RECV_B12", "3REDUCE", "STEP"]
)
def test_op_text_round_trip(text):
    assert str(Op.parse(f" {text} ")) == text


@pytest.mark.parametrize("text", ["", "F7", "3X7", "(3F7,4B2)FB", "(4B2;3F7)FB", "3F", "STEP3", "(3F7;4W2)FB"])
def test_unknown_text_is_an_error(text):
    with pytest.raises(PlanError):
        Op.parse(text)


def test_a_pair_is_one_forward_and_one_backward():
    with pytest.raises(PlanError):
        pair(Op("F", 0, 0), Op("F", 1, 1))


@pytest.mark.parametrize("name", [LINEAR, BIDIRECTIONAL, VEE])
@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_placement_is_consistent(name, ranks):
    placement = Placement(name, ranks)
    for micro in range(4):
        held = [[] for _ in range(ranks)]
        for stage in range(placement.num_stages):
            rank = placement.rank_of(stage, micro)
            assert stage in placement.stages_of(rank)
            assert rank in placement.replicas(stage)
            held[rank].append(stage)
        for stage in range(placement.num_stages - 1):
            assert abs(placement.rank_of(stage, micro) - placement.rank_of(stage + 1, micro)) <= 1
    every = sorted(m for d in range(placement.num_directions) for m in placement.micros(d, 7))
    assert every == list(range(7))


def test_impossible_placements():
    with pytest.raises(PlanError, match="dualpipev"):
        Placement(BIDIRECTIONAL, 3)
    with pytest.raises(PlanError):
        Placement("round", 2)
    with pytest.raises(PlanError):
        Placement(LINEAR, 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_files_round_trip(name, tmp_path):
    for micros in (2, 5, 8):
        for plan in (make_plan(name, 4, micros), lower(make_plan(name, 4, micros))):
            for path, text in ((tmp_path / "p.csv", plan.to_csv()), (tmp_path / "p.json", plan.to_json())):
                path.write_text(text)
                loaded = Plan.load(path)
                assert loaded == plan
                assert loaded.digest() == plan.digest()
                assert hash(loaded) == hash(plan)


def test_digests_tell_plans_apart():
    plans = [make_plan(name, 4, micros) for name in SCHEDULES for micros in (3, 8)]
    assert len({plan.digest() for plan in plans}) == len(set(plans))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", "{"),
        ("p.json", "[]"),
        ("p.json", json.dumps({"programs": "0F0"})),
        ("p.json", json.dumps({"programs": [["0F0"]], "micro_batches": "x"})),
        ("p.json", json.dumps({"programs": []})),
        ("p.csv", ""),
        ("p.csv", "0F0,zero\n"),
        ("p.csv", "0F0\n3F0\n"),
        ("p.txt", "0F0\n"),
    ],
)
def test_broken_files(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(PlanError, match=name):
        Plan.load(path)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "missing.csv")
