"""Two ranks of a benchmark with a slow link between them: network namespaces, joined by a veth pair whose two ends let
through so many bits a second (tc tbf). Needs root on Linux, and the programs `ip` and `tc`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

ADDRESSES = ("10.213.0.1", "10.213.0.2")


def usable() -> bool:
    """Whether this machine can make such a link."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return False
    name = f"dualpipe{os.getpid()}x"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


def run_linked(script: str, arguments: Sequence[str], megabit: float) -> Any:
    """Run `script` as two ranks (RANK, WORLD_SIZE, MASTER_ADDR set); returns the JSON that rank 0 prints last.

    Args:
        script: a Python file.
        arguments: of the script.
        megabit: what the link passes a second, each way.

    Raises:
        RuntimeError: a rank failed.
    """
    names = [f"dualpipe{os.getpid()}{end}" for end in "ab"]
    devices = [f"dp{os.getpid()}{end}" for end in "ab"]
    with ExitStack() as stack:
        # The namespaces outlive this process, so that SIGTERM has to unwind like any exception.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        stack.callback(signal.signal, signal.SIGTERM, before)
        for name in names:
            _sudo("ip", "netns", "add", name)
            stack.callback(_sudo, "ip", "netns", "del", name)
        _sudo("ip", "link", "add", devices[0], "netns", names[0], "type", "veth", "peer", devices[1], "netns", names[1])
        for name, device, address in zip(names, devices, ADDRESSES, strict=True):
            _sudo("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            for each in ("lo", device):
                _sudo("ip", "-n", name, "link", "set", each, "up")
            shape = ("tbf", "rate", f"{megabit}mbit", "burst", "128kb", "latency", "400ms")
            _sudo("tc", "-n", name, "qdisc", "add", "dev", device, "root", *shape)
        ranks = []
        for rank, (name, device) in enumerate(zip(names, devices, strict=True)):
            place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29400"}
            quiet = {"GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
            command = ["ip", "netns", "exec", name, sys.executable, script, *arguments]
            ranks.append(subprocess.Popen(command, env=os.environ | place | quiet, stdout=subprocess.PIPE, text=True))
            stack.callback(ranks[-1].kill)
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("a rank of the benchmark failed; its message is above")
    return json.loads(outputs[0].splitlines()[-1])


def _sudo(*command: str) -> None:
    subprocess.run(command, check=True)
