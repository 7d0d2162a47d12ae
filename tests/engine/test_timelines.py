"""Profiles of real runs on pooled ranks: what adds up, what is in the file, and what reads it."""

import io
import json
from contextlib import redirect_stdout

import profiled_runs as runs
import pytest

from dualpipe_engine.cli import main
from dualpipe_engine.profiling.breakdown import CATEGORIES, COMMUNICATION, WAITING
from dualpipe_engine.profiling.profile import KEY, read_profile
from dualpipe_engine.viz.chrome import read_chrome


@pytest.fixture(scope="module")
def profiled(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    return ranks.run(4, runs.profiled, folder=str(folder))


def test_every_category_counts_once(profiled):
    profile = read_profile(profiled[0][1])
    assert [rank.rank for rank in profile.ranks] == [0, 1, 2, 3]
    for rank in profile.ranks:
        assert set(rank.seconds) == set(CATEGORIES)
        assert all(seconds >= -1e-6 for seconds in rank.seconds.values()), rank.seconds
        assert 0 < rank.step <= profile.step + 1e-9
        assert rank.compute > 0
        assert rank.seconds[WAITING] + rank.seconds[COMMUNICATION] + rank.hidden[COMMUNICATION] > 0
        assert rank.memory_bytes > 1 << 20
        assert abs(rank.clock) <= rank.clock_error + 1e-3


def test_the_ring_keeps_the_last_steps(profiled):
    assert [kept for _, _, kept, _ in profiled] == [3] * 4
    assert len(read_profile(profiled[0][1]).steps) == 3


def test_the_summary_is_printed_once(profiled):
    texts = [text for text, *_ in profiled]
    assert texts[1:] == [""] * 3
    for word in ("waiting", "comm exposed", "bubble simulated", "peak memory", "rank 3", "largest bubble"):
        assert word in texts[0]


def test_the_file_is_a_trace_with_tracks_for_each_rank(profiled):
    data = profiled[0][3]
    assert data[KEY]["version"] == 1
    names = {(e["pid"], e["args"]["name"]) for e in data["traceEvents"] if e["name"] == "thread_name"}
    for rank in range(4):
        assert {(rank, "compute"), (rank, "reduction"), (rank, "communication 1")} <= names
    on_track = {(e["pid"], e["tid"]): [] for e in data["traceEvents"] if e["ph"] == "X"}
    for event in data["traceEvents"]:
        if event["ph"] == "X":
            on_track[event["pid"], event["tid"]].append(event)
    assert {event["cat"] for event in on_track[0, 1]} >= {"REDUCE"}
    kinds = {event["cat"] for event in on_track[0, 0]}
    assert {"F", "STEP", "receive"} <= kinds


def test_the_trace_draws_like_a_plan(profiled, tmp_path):
    path = profiled[0][1]
    timeline = read_chrome(path)
    plan = read_profile(path).plan
    drawn = [
        sorted(
            str(part)
            for span in timeline.of_rank(rank)
            for part in (span.op.parts or (span.op,))
            if part.kind in "FBIW"
        )
        for rank in range(4)
    ]
    planned = [sorted(str(part) for op in program for part in (op.parts or (op,))) for program in plan.programs]
    assert drawn == planned
    for rank in range(4):
        # A transfer that ends after the op it feeds has begun would show clocks that are not aligned.
        starts = {str(span.op): span.start for span in timeline.of_rank(rank)}
        for span in timeline.spans:
            if span.op.kind == "SEND_F" and (key := f"{span.op.stage + 1}F{span.op.micro}") in starts:
                assert span.end <= starts[key] + 1e-3
    target = tmp_path / "measured.svg"
    assert main(["draw", path, "--out", str(target)]) == 0
    assert "Device 3" in target.read_text()


def test_the_doctor_reads_the_file(profiled):
    out = io.StringIO()
    with redirect_stdout(out):
        assert main(["doctor", profiled[0][1]]) == 0
        assert main(["doctor", profiled[0][1], "--format", "json"]) == 0
    text, last = out.getvalue().rstrip().rsplit("\n", 1)
    assert text.count("expected gain") == len(json.loads(last)["findings"])
    findings = json.loads(last)["findings"]
    assert [finding["cost"] for finding in findings] == sorted((f["cost"] for f in findings), reverse=True)


@pytest.mark.parametrize("schedule", ["zbv", "1f1b"])
def test_profiling_can_begin_later_and_with_replicas(ranks, tmp_path, schedule):
    found = ranks.run(4, runs.profiled, folder=str(tmp_path), schedule=schedule, ranks=2, late=True, replicas=2)
    profile = read_profile(found[0][1])
    assert [(rank.replica, rank.rank) for rank in profile.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert read_chrome(found[0][1]).num_ranks == 2
    processes = {e["args"]["name"].split(" (")[0] for e in found[0][3]["traceEvents"] if e["name"] == "process_name"}
    assert processes == {"rank 0", "rank 1", "replica 1 rank 0", "replica 1 rank 1"}


def test_ops_are_ranges_of_torch_profiler(ranks):
    for names, program in ranks.run(2, runs.ranges):
        ops = [text for text in program if text[-1].isdigit() and ("F" in text or "B" in text) and "_" not in text]
        assert {f"dualpipe {text}" for text in ops if "(" not in text} <= names
        assert "dualpipe STEP" in names


def test_a_rank_that_asks_alone_is_told(ranks, tmp_path):
    first, second = ranks.run(2, runs.alone, folder=str(tmp_path))
    assert "on all ranks" in first
    assert second == ""


def test_clock_offsets_are_found(ranks):
    for rank, (real, shifted) in enumerate(ranks.run(3, runs.offsets)):
        assert abs(real[0]) <= real[1] + 1e-4
        assert shifted[0] == pytest.approx(100.0 * rank, abs=shifted[1] + 1e-4)
