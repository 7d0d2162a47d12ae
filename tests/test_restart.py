"""examples/restart.sh: a run that loses a rank goes on from its last checkpoint, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

EXAMPLES = Path(__file__).parent.parent / "examples"
RUNS = ("uninterrupted", "torchrun", "deepspeed")


def rows(folder, run):
    return [json.loads(line) for line in (folder / run / "losses.jsonl").read_text().splitlines()]


def compare(folder):
    return subprocess.run([sys.executable, EXAMPLES / "restart_losses.py", folder], stdout=subprocess.PIPE, text=True)


def run(command, env, limit):
    """Output and exit code; whatever it has started ends with it."""
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return output, process.returncode


@pytest.mark.all
def test_resumed_losses_equal_the_uninterrupted_run(tmp_path):
    env = os.environ | {"MASTER_PORT": str(free_port()), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    output, code = run(["bash", EXAMPLES / "restart.sh", tmp_path], env, limit=600)
    assert code == 0, output + "".join(log.read_text() for log in tmp_path.glob("*/errors.log"))
    assert output.count("rank 1 is killed after 5 steps") == 2
    assert output.count("goes on from the checkpoint after 3 steps") == 2
    assert [row["step"] for row in rows(tmp_path, "uninterrupted")] == list(range(8))
    expected = {row["step"]: row["loss"] for row in rows(tmp_path, "uninterrupted")}
    assert len(set(expected.values())) == 8
    for each in RUNS[1:]:
        found = rows(tmp_path, each)
        assert [row["step"] for row in found] == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
        assert all(row["loss"] == expected[row["step"]] for row in found)


@pytest.mark.parametrize(("change", "code"), [(0.0, 0), (1e-15, 1), (None, 1)])
def test_the_comparison_finds_one_bit(tmp_path, change, code):
    for each in RUNS:
        (tmp_path / each).mkdir()
        losses = [0.25, 0.125]
        if each == "deepspeed":
            losses = losses[:1] if change is None else [0.25, 0.125 + change]
        lines = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses)]
        (tmp_path / each / "losses.jsonl").write_text("".join(lines))
    done = compare(tmp_path)
    assert done.returncode == code
    assert ("DIFFERENT" in done.stdout) == bool(code)
