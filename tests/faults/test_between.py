"""An error between two batches reaches the other ranks, however they were started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

PROGRAM = str(Path(__file__).with_name("between.py"))
STARTS = {
    "fork": [sys.executable, PROGRAM, "fork"],
    "spawn": [sys.executable, PROGRAM, "spawn"],
    "torch.multiprocessing": [sys.executable, PROGRAM, "torch"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=PORT",
        PROGRAM,
        "x",
    ],
    "deepspeed": ["deepspeed", "--num_gpus=2", "--master_port=PORT", PROGRAM, "x"],
}
ALL = [pytest.mark.all, pytest.mark.faults_all]


@pytest.mark.parametrize("how", [how if how == "torchrun" else pytest.param(how, marks=ALL) for how in STARTS])
@pytest.mark.usefixtures("deepspeed_op")
def test_however_ranks_are_started(tmp_path, how):
    port = str(free_port())
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = [word.replace("PORT", port) for word in STARTS[how]] + [str(tmp_path)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    output = done.stdout
    assert done.returncode not in (0, None), output
    assert "SIGABRT" not in output and "exit code -6" not in output and "exitcode: -6" not in output, output
    assert "LookupError: poisoned" in output, output
    # A launcher may end a rank before it has come out of its batch; it never says anything else.
    told = tmp_path / "told"
    assert not told.exists() or "rank 1 is lost: it failed" in told.read_text(), told.read_text()
    assert how in ("torchrun", "deepspeed", "torch.multiprocessing") or told.exists(), output
