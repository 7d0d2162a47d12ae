"""Runs that make and give back engines, on forked ranks."""

import gc
import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import training
from deepspeed.pipe import PipelineModule
from torch import nn


def start(ranks, **pipeline):
    import dualpipe_engine

    config = training.settings(4, 1, 1, "fp32", "dualpipe")
    config["pipeline"] |= pipeline
    return dualpipe_engine.initialize(model=training.make_module(ranks, 4), config=config)[0]


def held(before=None):
    """What this process holds: files, threads, process groups. Threads and peers end a moment after they are told:
    it may take a while until that is what it was `before`. A connection that the other end is about to close
    is not waited for."""
    gc.collect()
    files, threads, groups, still, last = 0, 0, 0, 0, None
    for _ in range(200):
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        groups = len(dist.distributed_c10d._world.pg_map)
        still = still + 1 if (threads, groups) == last else 0
        last = threads, groups
        if still >= 10 and (before is None or (files <= before[0] + 1 and last == before[1:])):
            break
        time.sleep(0.02)
    return files, threads, groups


def one_after_another(ranks):
    """Losses of two engines, the second made of the layers of the first, and of one that goes on; and what is said
    where the module comes again."""
    import dualpipe_engine
    from dualpipe_engine.errors import ConfigError

    def made(layers):
        module = PipelineModule(layers=layers, num_stages=ranks, loss_fn=nn.functional.mse_loss)
        plain = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_allow_untested_optimizer": True}
        config = training.settings(4, 1, 1, "fp32", "dualpipe") | plain
        config.pop("scheduler")
        return dualpipe_engine.initialize(model=module, config=config)[0]

    def layers():
        torch.manual_seed(0)
        return [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)]

    rows = [(torch.full((2, 4), float(step)), torch.ones(2, 1)) for step in range(4)]
    with made(layers()) as engine:
        expected = [float(engine.train_batch(iter(rows))) for _ in range(4)]
    mine, found = layers(), []
    for _ in range(2):
        with made(mine) as engine:
            found += [float(engine.train_batch(iter(rows))) for _ in range(2)]
    try:
        dualpipe_engine.initialize(model=engine.module, config=training.settings(4, 1, 1, "fp32", "dualpipe"))
        said = ""
    except ConfigError as error:
        said = str(error)
    return expected, found, said


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cycles(ranks, count):
    """What is held, and resident memory in bytes, after each cycle of initialize, train, destroy."""
    found = []
    for _ in range(count):
        with start(ranks) as engine:
            engine.train_batch(training.stream(0))
        del engine
        dist.barrier()
        found.append((held(found[-1][0] if found else None), resident()))
    return found


def beside_each_other(ranks):
    """Losses of an engine alone, and of two that take turns, the first of which is given back in between."""

    with start(ranks) as engine:
        data = training.stream(0)
        alone = [float(engine.train_batch(data)) for _ in range(3)]
    first, second = start(ranks), start(ranks)
    streams = training.stream(0), training.stream(0)
    found = [[], []]
    for step in range(3):
        if step < 2:
            found[0].append(float(first.train_batch(streams[0])))
        else:
            first.destroy()
        found[1].append(float(second.train_batch(streams[1])))
    second.destroy()
    return alone, found


def ended_by_signal(ranks, folder, sent_to):
    """SIGTERM comes to some ranks within the second batch."""
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    engine = start(ranks, save_on_signal="SIGTERM", save_folder=folder)
    engine.client_state_on_signal = lambda: {"seen": engine.global_samples}
    data = training.stream(0)
    engine.train_batch(data)
    if dist.get_rank() in sent_to:
        os.kill(os.getpid(), signal.SIGTERM)
    code = None
    try:
        engine.train_batch(data)
    except SystemExit as ended:
        code = ended.code
    engine.destroy()
    again = start(ranks)
    path, client = again.load_checkpoint(folder)
    return code, heard, signal.getsignal(signal.SIGTERM) is mine, path, client, again.global_steps


def no_folder(ranks):
    from dualpipe_engine.errors import ConfigError

    engine = start(ranks, save_on_signal="SIGTERM")
    try:
        engine.train_batch(training.stream(0))
    except ConfigError as error:
        return str(error)


def other_handlers(ranks, folder):
    """An asyncio loop hears of a signal that comes within a batch; a process forked there writes into no file."""
    import asyncio
    import multiprocessing as mp

    engine, heard = start(ranks), []
    path = Path(folder, f"log-{dist.get_rank()}")

    def child():
        with path.open("wb") as file:
            # The numbers of files that were the parent's are free here, and this is one of them.
            copies = [os.dup(file.fileno()) for _ in range(64)]
            signal.signal(signal.SIGUSR1, lambda *_: None)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            for copy in copies:
                os.close(copy)

    def feed():
        for number, batch in enumerate(training.stream(0)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
                worker = mp.get_context("fork").Process(target=child)
                worker.start()
                worker.join()
            yield batch

    async def main():
        came = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: (heard.append(1), came.set()))
        loss = float(engine.train_batch(feed()))
        await asyncio.wait_for(came.wait(), 20)
        return loss

    loss = asyncio.run(main())
    return loss, heard, path.read_bytes(), threading.current_thread() is threading.main_thread()


def of_stock_deepspeed(ranks):
    """What is said of the layers of stock DeepSpeed's engine, and the losses after that is given back."""
    import deepspeed

    import dualpipe_engine
    from dualpipe_engine.errors import ConfigError

    rows = [(torch.full((2, 4), float(step)), torch.ones(2, 1)) for step in range(4)]
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)]
    plain = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_allow_untested_optimizer": True}
    config = training.settings(4, 1, 1, "fp32", "dualpipe") | plain
    config.pop("scheduler")

    def module():
        return PipelineModule(layers=layers, num_stages=ranks, loss_fn=nn.functional.mse_loss)

    first = module()
    stock = {name: section for name, section in config.items() if name != "pipeline"}
    engine, *_ = deepspeed.initialize(model=first, config=stock, model_parameters=list(first.parameters()))
    engine.train_batch(iter(rows))
    try:
        dualpipe_engine.initialize(model=module(), config=config)
        said = ""
    except ConfigError as error:
        said = str(error)
    engine.destroy()
    with dualpipe_engine.initialize(model=module(), config=config)[0] as engine:
        losses = [float(engine.train_batch(iter(rows))) for _ in range(2)]
    return said, losses
