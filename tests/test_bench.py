"""The parts of the benchmark report that need no ranks."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import types
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parent.parent / "examples" / "bench"


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        patch.setitem(sys.modules, "ranks", SimpleNamespace(run_ranks=None))  # the tests' own `ranks` has another
        yield importlib.import_module("report")


def test_planner_rows_count_the_ops_of_their_plans(report):
    from dualpipe_engine.schedule.passes.lower import lower
    from dualpipe_engine.schedule.search.make_plan import make_plan

    for optimize in (False, True):
        row = report.plan_row("dualpipe", 4, 16, optimize)
        plan = make_plan("dualpipe", 4, 16, optimize=optimize)
        assert (row["compute_ops"], row["ops"]) == (plan.num_ops, lower(plan).num_ops)
        assert row["seconds"] == pytest.approx(row["make"] + row["lower"] + row["verify"])
        assert row["yardsticks"] == pytest.approx(row["seconds"] / row["yardstick"])
        assert row["ops_per_second"] == pytest.approx(row["ops"] / row["seconds"])


def test_speedup_is_over_stock_with_as_many_micro_batches(report):
    found = [
        {"name": name, "micro_batches": count, "seconds": seconds, "simulated": None}
        for name, count, seconds in (
            (report.STOCK, 8, 2.0),
            (report.STOCK, 16, 6.0),
            ("ours", 8, 1.0),
            ("ours", 16, 2.0),
        )
    ]
    assert [row["speedup"] for row in report.beside_stock(found, 4)] == [1.0, 1.0, 2.0, 3.0]


def test_contestants_are_chosen_by_words_of_their_names(report):
    schedules = sys.modules["schedules"]
    chosen = schedules.chosen("stock, ours zb")
    assert chosen == ["stock 1f1b", "stock dualpipev", "ours zb1p", "ours zbv"]
    assert schedules.chosen("") == schedules.names() and "ours auto" in schedules.names()
    with pytest.raises(ValueError, match="--only: no name has nonsense; there are stock 1f1b, "):
        schedules.chosen("stock,nonsense")


def test_a_step_is_explained_by_part_and_kind_of_op(report):
    """Known amounts of time in a wait, in a part of the engine and in the stage, each within one op of a program."""
    import sleeping

    from dualpipe_engine.runtime import executor
    from dualpipe_engine.schedule.op import F, I, Op
    from dualpipe_engine.schedule.progress import Position, waiting

    explain = importlib.import_module("explain")
    position = Position()

    def busy(module):
        """Python code of a module, for two looks."""
        names = {"time": time}
        exec("def spin():\n end = time.perf_counter() + 0.04\n while time.perf_counter() < end: pass", names)
        return types.FunctionType(names["spin"].__code__, vars(module) | {"time": time})

    def step():
        position.op = Op(F, 0, 0)
        busy(sleeping)()
        with waiting():
            time.sleep(0.04)
        position.op = Op(I, 0, 0)
        busy(executor)()
        position.op = None

    found = explain.look_at(step, 2, position)
    spent = {(part, kind): seconds for part, kind, seconds in found["parts"]}
    assert sum(spent.values()) == pytest.approx(found["step"], rel=0.1)
    known = [("model", F), (explain.WAITING, F), ("executor and stages", I)]
    assert sum(spent[place] for place in known) >= 0.8 * found["step"]
    assert all(spent[place] >= 0.02 for place in known)  # each holds the thread for 0.04 s
    assert explain.columns(["STEP", "RECV_F", "W", explain.BETWEEN, "F", "REDUCE"]) == [
        "F", "W", "RECV_F", "REDUCE", "STEP", explain.BETWEEN,
    ]  # fmt: skip


def test_tables_json_and_png(report, tmp_path):
    from rich.console import Console

    rows = [{"pipeline": "ours", "step_ms": 12345.6, "speedup": 1.5}, {"pipeline": "not installed"}]
    section = report.Section("Title", ["pipeline"], "step_ms", rows)
    console = Console(width=120, record=True, file=StringIO())
    console.print(report.table(section))
    shown = console.export_text()
    assert "12,346" in shown and "1.5" in shown and "not installed" in shown
    report.write([section, section], tmp_path / "new")
    assert [one["rows"] for one in json.loads((tmp_path / "new" / "report.json").read_text())] == [rows, rows]
    assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.all
@pytest.mark.parametrize(
    "command",
    [
        "profiling.py --ranks 2 --micro-batches 4 --op 0 --pairs 2",
        "overhead.py --ranks 2 --micro-batches 4 --steps 1 --only stock,zb1p",
        "overhead.py --ranks 2 --micro-batches 4 --steps 1 --only zb1p --explain",
        "schedules.py --ranks 2 --micro-batches 4 --f 1 --i 1 --w 1 --steps 1 --only 1f1b,dualpipev",
        "ladder.py --steps 1 --only 1f1b",
        "computing.py --micro-batches 4 --hidden 32 --steps 1",
        "soak.py --steps 101",
    ],
    ids=lambda command: command.partition(" ")[0] + (" explain" if "explain" in command else ""),
)
def test_benchmarks_run(command):
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=BENCH, capture_output=True, text=True, timeout=200, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ms" in done.stdout or "KiB" in done.stdout or "MiB" in done.stdout, done.stdout


def test_overlap_on_one_device_runs_on_the_cpu_too():
    """--cuda is for a GPU, but must not rot where there is none."""
    command = [sys.executable, str(BENCH / "overlap.py"), "--cuda", "--device", "cpu"]
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 0, found.stderr
    rows = [line for line in found.stdout.splitlines() if line.startswith("| ") and " ms " in line]
    assert len(rows) == 3 and all(float(row.split("|")[-2]) > 0 for row in rows)


MODELS = ["--model llama", "--model qwen3-moe --exchange heads experts"]  #: whose ranks share sequences


@pytest.mark.all
@pytest.mark.parametrize("layers", ["--model plain", "--model qwen3-moe", "--exchange heads experts", *MODELS])
def test_overlap_over_a_slow_link(layers, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    if not importlib.import_module("link").usable():
        pytest.skip("needs root, network namespaces, ip and tc")
    words = f"overlap.py {layers} --ratios 1 --pairs 1 --layers 1 --kilobytes 256"
    done = subprocess.run([sys.executable, *words.split()], cwd=BENCH, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, row = done.stdout.splitlines()
    ratio, *times, hidden = (cell.strip() for cell in row.strip("|").split("|"))
    assert ratio == "1" and all(float(each.removesuffix(" ms")) > 0 for each in times)
    assert len(times) == 4 and hidden.endswith("%")
