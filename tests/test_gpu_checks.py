"""tests/gpu.sh and its checks, on the CPU with small sizes, so that they still run when a GPU is there."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_runs
import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU = {"DUALPIPE_GPU_CHECK": "cpu", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checks():
    """Their modules, imported as on the CPU."""
    before = {name: os.environ.get(name) for name in CPU}
    os.environ.update(CPU)
    sys.path[:0] = [gpu_runs.FOLDER]
    yield {name: importlib.import_module(name) for name in ("checks_comm", "checks_engine", "checks_ops", "run")}
    sys.path.remove(gpu_runs.FOLDER)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def on_pool(ranks):
    def run(world, function, options=None, **arguments):
        return ranks.run(world, gpu_runs.on_cpu, module=function.__module__, name=function.__name__, **arguments)

    return run


@pytest.mark.parametrize("name", ["split", "host_waits", "memory", "offloaded"])
def test_checks_of_one_process(checks, name):
    getattr(checks["checks_ops"], name)(None)


@pytest.mark.parametrize(
    "name", ["staging", "reductions", "schedules", "experts", pytest.param("auto", marks=pytest.mark.all)]
)
def test_checks_of_ranks(checks, ranks, name):
    module = checks["checks_comm" if name == "staging" else "checks_engine"]
    getattr(module, name)(on_pool(ranks))


@pytest.mark.all
@pytest.mark.parametrize("number", [2, 11])
def test_checks_that_start_ranks_themselves(checks, number):
    run = checks["run"]
    line = run.run_check(next(check for check in run.CHECKS if check.number == number))
    assert line["result"] == "passed", line


def test_one_that_fails_says_so(checks, monkeypatch):
    """The comparison of gradients sees a gradient that is wrong."""
    ops = checks["checks_ops"]
    plain = ops._gradients

    def wrong(operation, dtype, how):
        found = plain(operation, dtype, how)
        return found if how == "plain" else found | {"x": found["x"] * 1.001}

    monkeypatch.setattr(ops, "OPERATIONS", {"linear": ops.OPERATIONS["linear"]})
    monkeypatch.setattr(ops, "_gradients", wrong)
    with pytest.raises(AssertionError, match="linear, float32, split: x differs"):
        ops.split(None)


def test_ratios_are_found_in_what_the_bench_prints(checks):
    found = checks["checks_ops"].ratios_of
    assert found("computation 3.00 ms\npair / longest of the two: 1.043\n") == [1.043]
    table = "GPU\n| computation | F&B pair | pair / longer of the two |\n|---|---|---|\n| 1.00 ms | 1.10 ms | 1.100 |\n"
    assert found(table + "| 1.00 ms | 1.20 ms | 1.200 |\n") == [1.1, 1.2]
    assert found("nothing of the kind | 3.0 |\n") == []


def test_the_script_runs_checks_with_the_wheels_before_what_is_installed(tmp_path):
    """Through the shell: wheels come from the folder alone and are gone afterwards; each check leaves its line."""
    with zipfile.ZipFile(tmp_path / "deepspeed-99.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("deepspeed/__init__.py", "")
        about = "deepspeed-99.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: deepspeed\nVersion: 99.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    out, folder = tmp_path / "found.json", tmp_path / "temporary"
    folder.mkdir()
    done = subprocess.run(
        [str(ROOT / "tests" / "gpu.sh"), str(tmp_path), "--out", str(out), "--only", "1,12"],
        env=os.environ | CPU | {"PYTHON": sys.executable, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["hardware"] == "CPU" and report["torch"] and report["deepspeed"] == "99.0"
    assert [(line["check"], line["result"]) for line in report["checks"]] == [(1, "passed"), (12, "passed")]
    assert "2 of 2 passed" in done.stdout
    assert not [path for path in folder.iterdir() if (path / "deepspeed").exists()]


def test_what_hangs_or_fails_becomes_a_line(checks, monkeypatch, tmp_path):
    run = checks["run"]
    script = tmp_path / "check.py"
    lines = ("import sys, time", "print('begun', flush=True)", "sys.argv[-1] == '0' and time.sleep(60)", "sys.exit(3)")
    script.write_text("\n".join(lines))
    monkeypatch.setattr(run, "__file__", str(script))
    hung, failed = (run.run_check(run.Check(number, "x", "", 2)) for number in (0, 1))
    assert hung["result"] == "not done in 2 s" and "begun" in hung["output"]
    assert failed["result"] == "failed" and "begun" in failed["output"]


def test_reports_name_their_sources(checks, monkeypatch, capsys):
    """Who reads a report can see whether the code has changed since."""
    monkeypatch.setattr("sys.argv", ["run.py", "--code"])
    assert checks["run"].main() == 0
    assert capsys.readouterr().out.strip() == checks["run"].hardware()["code"]


def test_every_check_is_described(checks):
    """The table of docs/measured/README.md and the list of the script are of the same checks."""
    text = (ROOT / "docs" / "measured" / "README.md").read_text().partition("## Measure")[2]
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert rows[1:] == [str(check.number) for check in checks["run"].CHECKS]
    assert sum(check.limit_s for check in checks["run"].CHECKS) <= 15 * 60
    for check in checks["run"].CHECKS:
        module, function = check.of.split(":")
        assert f"def {function}(" in (ROOT / "tests" / "gpu" / f"{module}.py").read_text()
