"""An unedited DeepSpeed script under the deepspeed launcher."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import training
from ranks import free_port

SCRIPT = """
import argparse, sys
sys.path.insert(0, {tests!r})
import deepspeed
import training

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("--deepspeed_config")
args = parser.parse_args()
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
engine, *_ = deepspeed.initialize(args=args, model=training.make_module(2, 4))
data = training.stream(0)
losses = [float(engine.train_batch(data)) for _ in range(3)]
print(f"RESULT {{type(engine).__name__}} {{losses}}", flush=True)
"""


def write(folder, pipeline):
    """The script and its configuration; returns the words that start it."""
    script, settings = folder / "train.py", folder / "ds.json"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    config = training.settings(4)
    if pipeline is not None:
        config["pipeline"] = pipeline
    settings.write_text(json.dumps(config))
    return [str(script), "--deepspeed_config", str(settings)]


def launch(tmp_path, module, pipeline):
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command += ["--module", "dualpipe_engine.run"] if module else []
    command += write(tmp_path, pipeline)
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, cwd=tmp_path)


def run_here(words):
    """What `dualpipe_engine.run` does on a rank: its exit code, standard output and error."""
    from dualpipe_engine.run import main

    sys.argv = ["run", *words]
    out, error, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(error):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), error.getvalue()


def results(text):
    # Two processes write to one pipe, so their lines may run into each other.
    return re.findall(r"RESULT (\w+) (\[.*?\])", text)


def test_unedited_script_trains_like_stock(ranks, tmp_path):
    found = ranks.run(2, run_here, words=write(tmp_path, {"schedule": "dualpipe"}))
    (stock, _) = ranks.run(2, training.train, config=training.settings(4), ranks=2, steps=3)
    for code, out, error in found:
        assert code == 0, error
        [(name, losses)] = results(out)
        assert name == "DualPipeEngine"
        assert json.loads(losses) == pytest.approx(stock["losses"], rel=1e-5)


@pytest.mark.all
@pytest.mark.parametrize(("module", "expected"), [(True, "DualPipeEngine"), (False, "PipelineEngine")])
def test_under_the_launcher(tmp_path, module, expected):
    """Stock DeepSpeed ignores a schedule."""
    done = launch(tmp_path, module, {"schedule": "dualpipe"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = results(done.stdout)
    assert [name for name, _ in found] == [expected] * 2
    assert len({losses for _, losses in found}) == 1


def test_without_a_schedule_stock_deepspeed_runs(ranks, tmp_path):
    for code, out, _ in ranks.run(2, run_here, words=write(tmp_path, None)):
        assert code == 0
        assert [name for name, _ in results(out)] == ["PipelineEngine"]


def test_a_configuration_that_cannot_work_ends_all_ranks(ranks, tmp_path):
    for code, _, error in ranks.run(2, run_here, words=write(tmp_path, {"schedule": "dualpipo"})):
        assert code == 2
        assert error.startswith('dualpipe_engine: error: unknown schedule "dualpipo": did you mean "dualpipe"?')
        assert error.count("\n") == 1
