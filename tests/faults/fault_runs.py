"""Ranks that lose one of them, forked from a process that has the imports behind it."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import time
from pathlib import Path

import torch
import training
from ranks import free_port

RANKS, TIMEOUT_S = 4, 10.0
FAULTS = ("kill", "raise", "stop")
PHASES = ("warm-up", "steady", "cool-down", "reduction", "saving")


class Boom(Exception):
    pass


def strike(fault):
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "sleep":
        time.sleep(60)
    elif fault == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    else:
        raise Boom("poisoned")


def plant(engine, fault, phase):
    """Let `fault` strike in the next batch or save."""
    from dualpipe_engine.schedule.op import COMPUTE

    if phase == "saving":
        engine.checkpoint_engine.save = lambda *_, **__: strike(fault)
        return
    program = engine.plan.programs[engine.place.rank]
    compute = [op for op in program if op.kind in COMPUTE]
    target = {"warm-up": compute[0], "steady": compute[len(compute) // 2], "cool-down": compute[-1]}.get(phase)
    if target is None:
        engine._tail.reduction.finish = lambda: strike(fault)
        return
    handlers = engine._executor._handlers
    handle = handlers[target.kind]

    def struck(op):
        if op == target:
            strike(fault)
        handle(op)

    handlers[target.kind] = struck


def struck_run(folder, lost, fault, phase):
    import dualpipe_engine

    config = training.settings(8, schedule="dualpipe", p2p_timeout_s=TIMEOUT_S)
    engine, *_ = dualpipe_engine.initialize(model=training.make_module(RANKS, 4), config=config)
    data = training.stream(0)
    torch.distributed.barrier()  # a busy machine starts its ranks seconds apart, which is not what is timed here
    engine.train_batch(data)
    engine.save_checkpoint(folder, tag="good")
    if engine.global_rank == lost:
        Path(folder, "struck").touch()
        plant(engine, fault, phase)
    engine.train_batch(data)
    engine.save_checkpoint(folder, tag="torn")


def user_run(folder, where):
    """Code of the user raises in the second batch, on rank 0 only; the data end on both ranks that read them."""
    import dualpipe_engine

    armed = []

    def spoilt_layer(module, inputs):
        if armed:
            strike("raise")

    def spoilt_loss(output, labels):
        if armed:
            strike("raise")
        return training.cross_entropy(output, labels)

    def spoilt_loader():
        for number, batch in enumerate(training.stream(0)):
            if number == 8 + 5 and armed:
                strike("raise")
            if number == 8 + 5 and where == "end":
                return
            yield batch

    module = training.make_module(RANKS, 4)
    if where == "loss":
        module.loss_fn = spoilt_loss
    engine, *_ = dualpipe_engine.initialize(
        model=module, config=training.settings(8, schedule="dualpipe", p2p_timeout_s=TIMEOUT_S)
    )
    data = spoilt_loader() if where in ("loader", "end") else training.stream(0)
    engine.train_batch(data)
    if engine.global_rank == 0:
        Path(folder, "struck").touch()
        if where != "end":
            armed.append(True)
        if where == "layer":
            block = next(part for part in engine.module.modules() if isinstance(part, training.Block))
            block.register_forward_pre_hook(spoilt_layer)
    engine.train_batch(data)


def between_run(folder):
    """Code of the user raises between two batches, on rank 1 only."""
    import dualpipe_engine

    config = training.settings(8, schedule="dualpipe", p2p_timeout_s=TIMEOUT_S)
    engine, *_ = dualpipe_engine.initialize(model=training.make_module(RANKS, 4), config=config)
    data = training.stream(0)
    engine.train_batch(data)
    torch.distributed.barrier()
    if engine.global_rank == 1:
        Path(folder, "struck").touch()
        strike("raise")
    engine.train_batch(data)


def interrupted_run(folder):
    """Ctrl-C in a terminal: all ranks get the signal, wherever they are."""
    import dualpipe_engine

    config = training.settings(8, schedule="dualpipe", p2p_timeout_s=TIMEOUT_S)
    engine, *_ = dualpipe_engine.initialize(model=training.make_module(RANKS, 4), config=config)
    data = training.stream(0)
    engine.train_batch(data)
    ranks = [None] * RANKS
    torch.distributed.all_gather_object(ranks, os.getpid())
    if engine.global_rank == 0:
        Path(folder, "struck").touch()

        def interrupt(op):
            for pid in ranks:
                os.kill(pid, signal.SIGINT)
            time.sleep(60)

        engine._executor._handlers["F"] = engine._executor._handlers["FB"] = interrupt
    engine.train_batch(data)


def loaded_run(folder):
    import dualpipe_engine

    config = training.settings(8, schedule="dualpipe")
    engine, *_ = dualpipe_engine.initialize(model=training.make_module(RANKS, 4), config=config)
    path, _ = engine.load_checkpoint(folder)
    assert path and "good" in path, path
    engine.train_batch(training.stream(0))


def _rank(rank, port, log, function, arguments):
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_PORT=str(port))
    import deepspeed

    signal.signal(signal.SIGINT, signal.default_int_handler)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    function(**arguments)
    sys.stdout.flush()


def play(function, folder, limit, lost=None, **arguments):
    """Run `function` on all ranks; exit codes (None: still running), seconds from the strike, logs."""
    context = mp.get_context("fork")
    port, logs = free_port(), [Path(folder, f"{function.__name__}_{rank}.log") for rank in range(RANKS)]
    arguments = {"folder": folder, **arguments} | ({} if lost is None else {"lost": lost})
    workers = [
        context.Process(target=_rank, args=(rank, port, logs[rank], function, arguments)) for rank in range(RANKS)
    ]
    for worker in workers:
        worker.start()
    struck, start, ended = Path(folder, "struck"), time.monotonic(), None
    others = [worker for rank, worker in enumerate(workers) if rank != lost]
    while any(worker.is_alive() for worker in others) and time.monotonic() - start < 60 + limit:
        if ended is None and struck.exists():
            ended = time.monotonic()
        if ended is not None and time.monotonic() - ended > limit:
            break
        time.sleep(0.02)
    seconds = 0.0 if ended is None else time.monotonic() - ended
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    return codes, seconds, [log.read_text(errors="replace") for log in logs]


def serve(pipe):
    import rank_imports  # noqa: F401
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    while (task := pipe.recv()) is not None:
        pipe.send(play(**task))
