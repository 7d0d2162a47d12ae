"""Runs that save checkpoints, well and badly, on forked ranks."""

import os
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import training
from checkpoint_runs import digests, start


def saved_and_resumed(config, ranks, folder, steps, save_at):
    """Losses of a run that saves, and of one that goes on from there."""
    found = []
    for resumed in (False, True):
        engine, data = start(config, ranks), training.stream(0)
        if resumed:
            engine.load_checkpoint(folder)
            for _ in range(save_at * engine.gradient_accumulation_steps()):
                next(data)
        losses = []
        while engine.global_steps < steps:
            losses.append(float(engine.train_batch(data)))
            if engine.global_steps == save_at and not resumed:
                engine.save_checkpoint(folder, tag="x")
        engine._follow_save(wait=True)
        found.append(losses)
    return found


def failing_save(config, ranks, folder, lost, background):
    """A disk that is full on one rank; training goes on, and so does saving when there is space again."""
    from dualpipe_engine.errors import CheckpointError

    engine, data = start(config, ranks), training.stream(0)
    losses = [float(engine.train_batch(data))]
    engine.save_checkpoint(folder, tag="first")
    losses.append(float(engine.train_batch(data)))
    engine._follow_save(wait=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    where = "dualpipe_engine.engine.checkpoint.writer.sync"
    error = None
    try:
        with patch(where, full) if dist.get_rank() == lost else nullcontext():
            engine.save_checkpoint(folder, tag="second")
            if background:
                engine._pending._written.wait()
                losses.append(float(engine.train_batch(data)))
    except CheckpointError as caught:
        error = str(caught)
    path, _ = engine.load_checkpoint(folder)
    losses.append(float(engine.train_batch(data)))
    engine.save_checkpoint(folder, tag="again")
    engine.destroy()
    return error, losses, path


def unwritable(config, ranks, folder):
    from dualpipe_engine.errors import CheckpointError

    engine, errors = start(config, ranks), []
    engine.save_checkpoint(folder, tag="good")
    for name, tag in (("file", None), ("", "latest"), ("", "latest_universal"), ("", "file")):
        try:
            engine.save_checkpoint(f"{folder}/{name}", tag=tag)
        except CheckpointError as caught:
            errors.append(str(caught))
    return errors, engine.load_checkpoint(folder)[0], float(engine.train_batch(training.stream(0)))


def saved_at_the_end(config, ranks, folder):
    engine = start(config, ranks)
    engine.train_batch(training.stream(0))
    engine.save_checkpoint(folder, tag="last")
    engine._pending._thread.join()  # as the interpreter does


def saved_twice(config, ranks, folder):
    engine = start(config, ranks)
    engine.train_batch(training.stream(0))
    for tag in ("good", "bad"):
        engine.save_checkpoint(folder, tag=tag)


def loads_of_flipped(config, ranks, folder, flips):
    """What loading raises after each flip, which is taken back."""
    from dualpipe_engine.errors import CheckpointError

    engine, found = start(config, ranks), []
    for path, (byte, bit) in flips.items():
        _flip(path, byte, bit)
        try:
            engine.load_checkpoint(folder, tag=None if path.endswith("latest") else "bad")
        except CheckpointError as error:
            found.append(str(error))
        else:
            found.append("")
        _flip(path, byte, bit)
    engine.load_checkpoint(folder, tag="bad")
    return found


def _flip(path, byte, bit):
    dist.barrier()
    if dist.get_rank() == 0:
        with open(path, "r+b") as file:
            file.seek(byte)
            value = file.read(1)[0]
            file.seek(byte)
            file.write(bytes([value ^ 1 << bit]))
    dist.barrier()


def two_jobs(config, ranks, folder):
    """Two engines that live at the same time are two jobs."""
    from dualpipe_engine.errors import CheckpointError

    first, second = start(config, ranks), start(config, ranks)
    first.train_batch(training.stream(0))
    first.save_checkpoint(folder, tag="x")
    second.save_checkpoint(folder, tag="y")
    want = digests(first)
    error = ""
    try:
        second.save_checkpoint(folder, tag="x")
    except CheckpointError as caught:
        error = str(caught)
    second.load_checkpoint(folder, tag="x")
    return error, digests(second) == want


def saves_beside_another_job(config, ranks, folder, name):
    """One of two jobs that save at the same time, into one folder: tags of its own and one that both want.

    Returns:
        Digests by tag that was saved, sentences by tag that was not.
    """
    from dualpipe_engine.errors import CheckpointError

    engine, data = start(config, ranks), training.stream(0, seed=len(name))
    Path(folder, f"ready {name} {dist.get_rank()}").touch()
    while len(list(Path(folder).glob("ready *"))) < 2 * ranks:
        time.sleep(0.01)
    saved, refused = {}, {}
    for step in range(4):
        engine.train_batch(data)
        for tag in (f"{name}{step}", "both"):
            try:
                engine.save_checkpoint(folder, tag=tag)
                saved[tag] = digests(engine)
            except CheckpointError as error:
                refused[tag] = str(error)
    return saved, refused


def digests_of(config, ranks, folder, tags):
    engine, found = start(config, ranks), {}
    for tag in tags:
        engine.load_checkpoint(folder, tag=tag)
        found[tag] = digests(engine)
    return found


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def loaded_with_a_pickle(config, ranks, folder):
    engine = start(config, ranks)
    engine.save_checkpoint(folder, tag="x")
    if dist.get_rank() == 0:
        Path(folder, "x", "dualpipe_files.json").unlink()
        path = Path(folder, "x", "layer_03-model_states.pt")
        torch.save({"trap": Trap(str(Path(folder, "unpickled")))}, path)
    dist.barrier()
    engine.load_checkpoint(folder, tag="x")
