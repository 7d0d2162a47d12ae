"""Ranks that are killed while a thread writes their checkpoint, and what they leave, on forked ranks.

Moments are the lines of `engine/checkpoint` in the order in which a save comes to them, on both threads.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import threading
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch.distributed as dist
import training

MICROS = 4
OURS = os.path.join("dualpipe_engine", "engine", "checkpoint")


def start():
    import dualpipe_engine

    config = training.settings(MICROS, schedule="dualpipe", p2p_timeout_s=20) | {"checkpoint": {"async": True}}
    return dualpipe_engine.initialize(model=training.make_module(2, 2), config=config)[0]


def digests(engine):
    return {name: training.digest(value) for name, value in training.weights(engine).items()}


def batch(step):
    return islice(training.stream(0), step * MICROS, (step + 1) * MICROS)


@contextmanager
def traced(at_line):
    """Call `at_line` with (file, line) before every line of a save, in whichever thread."""

    def line(frame, event, _):
        if event == "line":
            at_line((os.path.basename(frame.f_code.co_filename), frame.f_lineno))
        return line

    def call(frame, event, _):
        return line if OURS in frame.f_code.co_filename else None

    threading.settrace(call)
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(None)
        threading.settrace(None)


def saves(engine, folder, tags, around):
    """Train and save under each tag; what a run that resumes from each must come to: weights then, and a step later."""
    found = []
    for step, tag in enumerate(tags):
        engine.train_batch(batch(step))
        found.append(digests(engine))
        with around(step):
            engine.save_checkpoint(folder, tag=tag, client_state={"step": step})
            engine.wait_for_checkpoint()
    engine.train_batch(batch(len(tags)))
    return [*found, digests(engine)]


def uninterrupted():
    """Weights of a run that saves nothing."""
    with start() as engine:
        found = []
        for step in range(3):
            engine.train_batch(batch(step))
            found.append(digests(engine))
        return found


def pictured(folder, pictures, tags):
    """What stands in the folder whenever the second save has changed it there, as a copy: a kill would leave that."""
    lock, seen = threading.Lock(), []

    def picture(_):
        with lock:
            now = sorted((str(path.relative_to(folder)), _size(path)) for path in Path(folder).rglob("*"))
            if not seen or now != seen[-1]:
                shutil.copytree(folder, Path(pictures, f"{len(seen):03d}"), copy_function=_copy)
                seen.append(now)

    first = dist.get_rank() == 0
    with start() as engine:
        return saves(engine, folder, tags, lambda step: traced(picture if first and step else lambda _: None))


def _size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # the other rank writes, too
        return None


def _copy(source, target):
    try:
        shutil.copy2(source, target)
    except FileNotFoundError:
        Path(target).touch()


def killed(folder, victims, moment, size):
    """Kill ranks within the second save, and let the others come to their end.

    Args:
        victims: ranks.
        moment: of the lines of the save, as a fraction.
        size: kill instead when a file grows beyond this fraction of the largest one; None: not.
    """
    engine, lines, hit = start(), {}, []
    pids = [None] * 2
    dist.all_gather_object(pids, os.getpid())

    def strike(line):
        if line == hit[0]:
            for rank in victims:
                os.kill(pids[rank], signal.SIGKILL)

    @contextmanager
    def around(step):
        if step == 0 or dist.get_rank() != victims[0]:
            with traced(lambda line: lines.setdefault(line)):
                yield
        elif size is not None:
            largest = max(path.stat().st_size for path in Path(folder, "first").iterdir())
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * largest), resource.RLIM_INFINITY))
            yield
        else:
            hit.append(list(lines)[int(moment * len(lines))])
            with traced(strike):
                yield

    saves(engine, folder, ["first", "second"], around)
    if dist.get_rank() in victims:  # the line was not come to a second time
        os.kill(os.getpid(), signal.SIGKILL)


def resumed(folders):
    """What loading in each folder comes to: the tag, the step of the save, weights, and weights a step later.
    Saving goes on there, and leaves nothing half done."""
    found = []
    with start() as engine:
        engine.train_batch(batch(0))  # for the optimizer to have a state
        for folder in folders:
            path, client = engine.load_checkpoint(folder)
            loaded = digests(engine)
            engine.train_batch(batch(client["step"] + 1))
            later = digests(engine)
            engine.save_checkpoint(folder, tag="next")
            engine.wait_for_checkpoint()
            there = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
            found.append((Path(path).parent.name, client["step"], loaded, later, there))
    return found
