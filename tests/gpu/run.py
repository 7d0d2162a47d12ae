"""Proves the engine on one GPU: every check in a process of its own, with a time limit of its own, and a line in a JSON
as soon as it is done. What fails does not stop the rest. What measures no times runs beside others, one for four cores.

    python tests/gpu/run.py [--out FILE.json] [--only 1,4]        # by tests/gpu.sh, which prepares an environment
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MARK = "DUALPIPE-CHECK "


class Check(NamedTuple):
    """`of` is the module and function; `limit_s` seconds."""

    number: int
    name: str
    of: str
    limit_s: int
    engine: bool = False  #: needs DeepSpeed
    alone: bool = False  #: measures times, or makes what others need


CHECKS = [
    Check(0, "the communication helper builds", "checks_comm:helper", 90, alone=True),
    Check(1, "a wait orders the stream and returns", "checks_comm:wait_returns", 40, alone=True),
    Check(2, "ranks without tags make their groups and train", "checks_engine:untagged", 90, True),
    Check(3, "staged transfers under device sleeps", "checks_comm:staging", 50),
    Check(4, "split backward equals plain backward", "checks_ops:split", 50),
    Check(5, "host waits of blocks", "checks_ops:host_waits", 40),
    Check(6, "memory of phases", "checks_ops:memory", 40),
    Check(7, "reductions under device sleeps", "checks_engine:reductions", 60, True),
    Check(8, "every schedule trains as one process", "checks_engine:schedules", 100, True),
    Check(9, "experts shared by replicas", "checks_engine:experts", 60, True),
    Check(10, "auto leaves the model alone and measures well", "checks_engine:auto", 90, True, alone=True),
    Check(11, "a lost rank ends the others", "checks_faults:lost_ranks", 60, True),
    Check(12, "an F&B pair takes as long as its longest part", "checks_ops:overlap", 90, alone=True),
    Check(13, "activations in host memory", "checks_ops:offloaded", 40, alone=True),
]


def hardware() -> dict[str, str]:
    """What the numbers were measured on."""
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("DUALPIPE_GPU_CHECK") != "cpu"
    found = {
        "hardware": torch.cuda.get_device_name(0) if gpu else "CPU",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda) if gpu else "",
        "python": sys.version.split()[0],
        "cores": str(os.cpu_count()),
        "code": code(),
    }
    with suppress(metadata.PackageNotFoundError):
        found["deepspeed"] = metadata.version("deepspeed")
    if gpu:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def code() -> str:
    """Of which sources the numbers are: SHA-256, the first 12 digits, over the engine, the helper and these checks."""
    found = hashlib.sha256()
    for folder in ("dualpipe_engine", "csrc", "tests/gpu", "examples/bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp"):
                found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


def run_check(check: Check) -> dict[str, Any]:
    """The line of a check: passed, failed (with the last lines of what it printed) or out of time."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, __file__, "--check", str(check.number)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=check.limit_s)
        result = "failed"
    except subprocess.TimeoutExpired:
        result = f"not done in {check.limit_s} s"
        os.killpg(process.pid, signal.SIGKILL)  # its ranks too
        output, _ = process.communicate()
    line: dict[str, Any] = {"check": check.number, "name": check.name, "result": result}
    marked = [each for each in output.splitlines() if each.startswith(MARK)]
    if marked:
        line |= json.loads(marked[-1].removeprefix(MARK))
    if line["result"] not in ("passed", "skipped"):
        line["output"] = output[-4000:].replace(f"{ROOT}/", "")
    line["seconds"] = round(time.monotonic() - start, 1)
    return line


def inside(number: int) -> None:
    """In the process of a check: run it and print its line."""
    sys.path[:0] = [str(HERE), str(ROOT)]
    check = next(each for each in CHECKS if each.number == number)
    module, function = check.of.split(":")
    try:
        from common import run_ranks

        facts = getattr(importlib.import_module(module), function)(run_ranks)
        line = {"result": "passed", "facts": facts}
    except ModuleNotFoundError as error:
        missing = check.engine and error.name == "deepspeed"
        line = {"result": "skipped" if missing else "failed", "facts": {"error": str(error)}}
    except BaseException as error:
        traceback.print_exc()
        line = {"result": "failed", "facts": {"error": (str(error).strip() or repr(error)).splitlines()[-1]}}
    print(f"\n{MARK}{json.dumps(line)}", flush=True)
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file (default: docs/measured/HARDWARE.json)")
    parser.add_argument("--only", default="", help="numbers of checks, with commas")
    parser.add_argument("--minutes", type=float, default=7.8, help="for all checks together (default 7.8)")
    parser.add_argument("--code", action="store_true", help="print which sources these are, as reports name them")
    parser.add_argument("--check", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.code:
        print(code())
        return 0
    if args.check is not None:
        inside(args.check)
    report: dict[str, Any] = hardware()
    if report["hardware"] == "CPU" and os.environ.get("DUALPIPE_GPU_CHECK") != "cpu":
        print("there is no GPU here; DUALPIPE_GPU_CHECK=cpu runs the same code on the CPU", file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", report["hardware"].lower()).strip("-")
    out = args.out or ROOT / "docs" / "measured" / f"{name}.json"
    wanted = {int(number) for number in args.only.split(",") if number.strip()}
    report |= {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "checks": []}
    until = time.monotonic() + 60 * args.minutes
    writing = threading.Lock()

    def made(check: Check) -> None:
        left = until - time.monotonic()
        line = run_check(check._replace(limit_s=max(1, min(check.limit_s, int(left)))))
        with writing:
            report["checks"] = sorted([*report["checks"], line], key=lambda each: each["check"])
            out.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{line['check']:>2}  {line['result']:<8} {line['seconds']:>6.1f} s  {line['name']}", flush=True)
            if line["result"] not in ("passed", "skipped"):
                print("    " + str(line.get("facts", {}).get("error", line.get("output", "")[-300:])), flush=True)

    chosen = [check for check in CHECKS if not wanted or check.number in wanted]
    for check in chosen:
        if check.alone:
            made(check)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        list(pool.map(made, [check for check in chosen if not check.alone]))
    results = [line["result"] for line in report["checks"]]
    print(f"{results.count('passed')} of {len(results)} passed: {out}")
    return 0 if all(result == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
