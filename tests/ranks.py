"""Processes that play ranks. Importing deepspeed costs seconds a process, so all tests share one pool of them."""

from __future__ import annotations

import copy
import multiprocessing as mp
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TASKS_A_LIFE = 16  #: tasks after which the processes are replaced


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _serve(pipe) -> None:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1")
    import deepspeed
    import torch
    from deepspeed.utils import groups

    torch.set_num_threads(1)
    plain = (dict, list, int, str, bool, type(None))
    fresh = {key: copy.copy(value) for key, value in vars(groups).items() if key[:2] != "__" and type(value) in plain}
    while True:
        task = pipe.recv()
        if task is None:
            return
        rank, world, port, function, kwargs = task
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
        os.environ.update(LOCAL_SIZE="0")  # no shared-memory op: it cannot start again with another world
        try:
            for key, value in fresh.items():
                setattr(groups, key, copy.copy(value))
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
            answer = (True, function(**kwargs))
        except BaseException as error:
            answer = (False, (type(error).__name__, str(error), traceback.format_exc()))
        finally:
            try:
                deepspeed.comm.comm.destroy_process_group()
            except Exception:
                traceback.print_exc()
            deepspeed.comm.comm.cdb = None
            torch.manual_seed(0)
        pipe.send(answer)


def _remove_stale_lock() -> None:
    """Left by a process that was killed while DeepSpeed built its shared-memory op: all others would sleep on it."""
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > 180:
        lock.unlink()


class RankError(Exception):
    """A task failed; `errors` maps rank to (type name, message, traceback)."""

    def __init__(self, errors: dict[int, tuple[str, str, str]]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"--- rank {rank}\n{error[2]}" for rank, error in errors.items()))


class RankPool:
    """Runs a function on `world` processes at once, each with torch.distributed (gloo) initialized."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Any]] = []
        self._tasks = 0
        _remove_stale_lock()

    def run(self, world: int, function, timeout: float = 300.0, **kwargs) -> list[Any]:
        # A process group's threads outlive it, and hundreds of them make a process slow.
        self._tasks += 1
        if self._tasks % TASKS_A_LIFE == 0:
            self.close()
        context = mp.get_context("spawn")
        while len(self._workers) < world:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            self._workers.append((process, ours))
        port = free_port()
        for rank in range(world):
            self._workers[rank][1].send((rank, world, port, function, kwargs))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < world:
            for rank in range(world):
                process, pipe = self._workers[rank]
                try:
                    if rank not in answers and pipe.poll(0.005):
                        answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process.join(10)
                if rank not in answers and not process.is_alive():
                    answers[rank] = (False, ("Died", f"exit code {process.exitcode}", "process died"))
            failed = [rank for rank, answer in answers.items() if not answer[0]]
            if time.monotonic() > (min(deadline, time.monotonic() + 5) if failed else deadline):
                break
            if failed and len(answers) < world:
                deadline = min(deadline, time.monotonic() + 8)
        if len(answers) < world:
            missing = [rank for rank in range(world) if rank not in answers]
            for rank in missing:
                answers[rank] = (False, ("Hang", "no answer", f"rank {rank} did not answer"))
            self.close(kill=True)
        errors = {rank: answer[1] for rank, answer in sorted(answers.items()) if not answer[0]}
        if errors:
            raise RankError(errors)
        return [answers[rank][1] for rank in range(world)]

    def close(self, kill: bool = False) -> None:
        for process, pipe in self._workers:
            if kill:
                process.kill()
            else:
                pipe.send(None)
        for process, _ in self._workers:
            process.join(10)
        self._workers.clear()
        sys.stdout.flush()
