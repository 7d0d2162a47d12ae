"""Processes that play ranks, forked for each task from one that has the imports behind it."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import random
import socket
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

HERE = Path(__file__).parent
GRACE_S = 8.0  #: seconds that the other ranks get after one has failed


def free_port() -> int:
    """A port that nobody has, below those that connections are given: between now and the start of the ranks no
    connection of others takes it."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@cache
def forks() -> mp.context.ForkServerContext:
    """A multiprocessing context whose processes start with `rank_imports` behind them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["rank_imports"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), before]))  # Python 3.11 takes no other path
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _play(pipe, rank: int, world: int, port: int, function, kwargs: dict[str, Any]) -> None:
    import deepspeed
    import rank_imports  # noqa: F401

    mp.set_start_method("fork", force=True)  # Linux's default, not how this rank began: workers of a DataLoader use it
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
    # The store is the test's own: a port that is asked for and given back may be somebody else's by then.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    try:
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]  # whoever makes another world meets at its own address
        _meet(world, port)
        answer = (True, function(**kwargs))
    except BaseException as error:
        answer = (False, (type(error).__name__, str(error), traceback.format_exc()))

    pipe.send_bytes(pickle.dumps(answer))  # by value: torch would share memory with a process that is about to end
    with suppress(EOFError):
        pipe.recv()  # until all have answered: an end closes connections that others may still use
    os._exit(0)


def _meet(world: int, port: int) -> None:
    """Return when all ranks are here: one that leaves its world early would cut off those that still connect."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    if store.add("here", 1) == world:
        store.set("all here", "")
    store.wait(["all here"])


class RankError(Exception):
    """A task failed; `errors` maps rank to (type name, message, traceback)."""

    def __init__(self, errors: dict[int, tuple[str, str, str]]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"--- rank {rank}\n{error[2]}" for rank, error in errors.items()))


class Ranks:
    """Runs functions on processes at once, each with torch.distributed (gloo) initialized."""

    def run(self, world: int, function, timeout: float = 300.0, **kwargs) -> list[Any]:
        """What `function(**kwargs)` returns on each of `world` ranks.

        Raises:
            RankError: a rank raised, died, or did not answer within `timeout` seconds.
        """
        context = forks()
        # Held here while the task runs.
        store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=timeout), wait_for_workers=False)
        workers = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_play, args=(theirs, rank, world, store.port, function, kwargs))
            process.start()
            theirs.close()  # so that an end is seen
            workers.append((process, ours))
        try:
            return _gather(workers, time.monotonic() + timeout)
        finally:
            for _, pipe in workers:
                pipe.close()
            for process, _ in workers:
                process.join(1)
                if process.is_alive():
                    process.kill()
                    process.join()


def _gather(workers: list[tuple[Any, Any]], deadline: float) -> list[Any]:
    answers: dict[int, tuple[bool, Any]] = {}
    open_pipes = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
    while open_pipes and (ready := wait(list(open_pipes), max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = open_pipes.pop(pipe)
            try:
                answers[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                workers[rank][0].join(10)
                answers[rank] = (False, ("Died", f"exit code {workers[rank][0].exitcode}", "process died"))
            if not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for rank in open_pipes.values():
        answers[rank] = (False, ("Hang", "no answer", f"rank {rank} did not answer"))
    errors = {rank: answer[1] for rank, answer in sorted(answers.items()) if not answer[0]}
    if errors:
        raise RankError(errors)
    return [answers[rank][1] for rank in range(len(workers))]
