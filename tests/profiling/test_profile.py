"""Profiles as values: the JSON round trip, and files that are none."""

import json
import subprocess
import sys

import pytest
from simulated_profile import profile

from dualpipe_engine.cli import main
from dualpipe_engine.errors import ProfileError
from dualpipe_engine.profiling.build import build_profile, make_trace
from dualpipe_engine.profiling.profile import KEY, Profile, read_profile
from dualpipe_engine.schedule.op import SEND_B, SEND_F, F, Op, atoms
from dualpipe_engine.schedule.records import OP, RECEIVE, SEND, BatchRecord, Mark, RankRecord
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate
from dualpipe_engine.viz.chrome import read_chrome


def recorded(schedule="1f1b", ahead=50.0):
    """What 4 ranks would record of a simulated step whose transfers take nothing; rank r's clock is r * ahead fast."""
    plan = make_plan(schedule, 4, 6)
    timeline = simulate(plan, CostModel(1.0, 1.0, 1.0))
    records = []
    for rank in range(4):
        marks, now = [], 0.0
        for span in timeline.of_rank(rank):
            op = span.op
            marks += [Mark(RECEIVE, op, now, span.start), Mark(OP, op, span.start, span.end)]
            sent = Op(SEND_F if op.kind == F else SEND_B, op.stage, op.micro)
            marks.append(Mark(SEND, sent, span.end, span.end))
            now = span.end
        step = BatchRecord(0.0, timeline.makespan, marks)
        records.append(RankRecord(rank, 0, "here", [step.shifted(rank * ahead)] * 2, 7, rank * ahead))
    return plan, timeline, records


def test_costs_and_bubbles_of_a_simulated_step_are_found():
    plan, timeline, records = recorded()
    found = build_profile(records[::-1], plan)
    assert [rank.rank for rank in found.ranks] == [0, 1, 2, 3]
    assert [rank.bubble for rank in found.ranks] == pytest.approx(timeline.bubble())
    assert [rank.seconds["waiting"] for rank in found.ranks[:1]] == pytest.approx([timeline.bubble()[0]])
    assert found.makespan == pytest.approx(timeline.makespan)
    assert found.simulated().makespan == pytest.approx(timeline.makespan)
    assert found.costs.at(2)[:2] == pytest.approx((1.0, 2.0))


def test_the_trace_is_on_one_clock(tmp_path):
    plan, timeline, records = recorded()
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(make_trace(build_profile(records, plan), records)))
    found = {(s.rank, str(s.op)): (s.start, s.end) for s in read_chrome(path).spans if s.op.kind in "FB"}
    expected = {(s.rank, str(s.op)): (s.start, s.end) for s in timeline.spans}
    assert found.keys() == expected.keys()
    for key, times in expected.items():
        assert found[key] == pytest.approx(times, abs=1e-6)


def test_what_is_written_is_read():
    case = profile()
    again = Profile.from_json(json.loads(json.dumps(case.to_json())))
    assert again.to_json() == case.to_json()
    assert again.plan == case.plan
    assert sum(len(atoms(op)) for op in again.plan.programs[0]) > 0


def test_files_that_are_no_profile_are_named(tmp_path, capsys):
    path = tmp_path / "profile.json"
    good = profile().to_json()
    for text, reason in [
        ("{", "Expecting"),
        ("{}", "no profile"),
        (json.dumps({KEY: {"version": 99}}), "version"),
        (json.dumps({KEY: {**good, "ranks": []}}), "damaged"),
        (json.dumps({KEY: {**good, "costs": {"f": [1.0]}}}), "damaged"),
    ]:
        path.write_text(text)
        with pytest.raises(ProfileError, match=reason) as caught:
            read_profile(path)
        assert str(path) in str(caught.value)
    assert main(["doctor", str(path)]) == 2
    assert "damaged" in capsys.readouterr().err
    with pytest.raises(ProfileError, match="no step"):
        build_profile([], profile().plan)


def test_the_doctor_needs_no_torch(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({KEY: profile().to_json()}))
    code = "import sys; from dualpipe_engine.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    run = [sys.executable, "-c", code, "doctor", str(path)]
    result = subprocess.run(run, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
    assert "Nothing stands out" in result.stdout
