"""Two ranks on two machines: network namespaces with a cable between them, which the test pulls out."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import training
from ranks import forks, free_port

CLONE_NEWNET = 0x40000000
TIMEOUT_S = 10.0


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Cable:
    """Between the namespaces of rank 0 and rank 1."""

    def __init__(self):
        name = f"dp{os.getpid() % 100_000}"
        self.spaces = [f"{name}-{rank}" for rank in range(2)]
        self.ends = [f"{name}e{rank}" for rank in range(2)]

    def __enter__(self):
        for space in self.spaces:
            ip("netns", "add", space)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for rank, (space, end) in enumerate(zip(self.spaces, self.ends, strict=True)):
            ip("link", "set", end, "netns", space)
            ip("-n", space, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", end)
            ip("-n", space, "link", "set", end, "up")
            ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_):
        for space in self.spaces:
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", space)

    @contextmanager
    def pulled(self):
        ip("-n", self.spaces[1], "link", "set", self.ends[1], "down")
        try:
            yield
        finally:
            ip("-n", self.spaces[1], "link", "set", self.ends[1], "up")


def available():
    """Whether this user may make namespaces and cables."""
    try:
        with Cable():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _enter(space):
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{space}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {space}")


def _rank(rank, port, folder, space, end):
    _enter(space)
    with open(Path(folder, f"log{rank}"), "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port))
    os.environ.update(MASTER_ADDR="10.77.0.1", GLOO_SOCKET_IFNAME=end)
    import deepspeed

    signal.signal(signal.SIGINT, signal.default_int_handler)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    _train(folder, rank)
    sys.stdout.flush()


def _train(folder, rank):
    import dualpipe_engine

    config = training.settings(4, schedule="dualpipe", p2p_timeout_s=TIMEOUT_S)
    engine, *_ = dualpipe_engine.initialize(model=training.make_module(2, 4), config=config)
    data = training.stream(0)
    for step in range(400):
        engine.train_batch(data)
        Path(folder, f"step{rank}").write_text(str(step))
        if Path(folder, "enough").exists() and step % 20 == 19:
            break
        time.sleep(0.02)


def play(folder, down_s):
    """Pull the cable for `down_s` seconds, or for good; exit codes, seconds from the pull to the end, logs, and the
    steps that rank 0 had made when the cable was in again."""
    context, port = forks(), free_port()
    with Cable() as cable:
        workers = [
            context.Process(target=_rank, args=(rank, port, str(folder), cable.spaces[rank], cable.ends[rank]))
            for rank in range(2)
        ]
        for worker in workers:
            worker.start()
        try:
            _until(lambda: _step(folder) >= 3, 120)
            start = time.monotonic()
            with cable.pulled():
                if down_s is None:
                    _until(lambda: not any(worker.is_alive() for worker in workers), 3 * TIMEOUT_S)
                else:
                    time.sleep(down_s)
            before = _step(folder)
            Path(folder, "enough").touch()
            _until(lambda: not any(worker.is_alive() for worker in workers), 60)
            seconds = time.monotonic() - start
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
    logs = [Path(folder, f"log{rank}").read_text(errors="replace") for rank in range(2)]
    return [worker.exitcode for worker in workers], seconds, logs, (before, _step(folder))


def _step(folder):
    try:
        return int(Path(folder, "step0").read_text() or -1)
    except FileNotFoundError:
        return -1


def _until(met, limit_s):
    until = time.monotonic() + limit_s
    while not met() and time.monotonic() < until:
        time.sleep(0.05)
