"""Strangers at an open door of a job that trains and saves, and folders in which saving fails, on forked ranks."""

from __future__ import annotations

import os
import random
import resource
import shutil
import socket
import struct
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
import training

KINDS = ("binary", "http", "other json", "long line", "no newline", "slow", "reset", "many")
PHASES = ("idle", "training", "saving")


def start(**sections):
    import dualpipe_engine

    config = training.settings(4, schedule="dualpipe", p2p_timeout_s=30) | sections
    return dualpipe_engine.initialize(model=training.make_module(2, 4), config=config)[0]


class Strangers(threading.Thread):
    """Call at a port in one way, again and again."""

    def __init__(self, port, kind):
        super().__init__(daemon=True)
        self.port, self.kind, self.calls, self.over = port, kind, 0, threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()

    def run(self):
        chance = random.Random(3)
        while not self.over.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as sock:
                self.calls += 1
                self._speak(sock, chance)
            time.sleep(0.005)

    def _speak(self, sock, chance):
        if self.kind == "binary":
            sock.sendall(chance.randbytes(3000) + b"\n")
        elif self.kind == "http":
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        elif self.kind == "other json":
            sock.sendall(chance.choice([b"7\n", b"null\n", b'[{"rank": 1}]\n', b'{"cause": {"kind": "gone"}}\n']))
        elif self.kind == "long line":
            sock.sendall(b"a" * 8192)
        elif self.kind == "no newline":
            sock.sendall(b'{"rank": 1')
            self.over.wait(0.2)
        elif self.kind == "slow":
            for _ in range(20):
                sock.sendall(b"a")
                self.over.wait(0.02)
        elif self.kind == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            others = [socket.create_connection(("127.0.0.1", self.port), timeout=2) for _ in range(100)]
            for each in others:
                each.close()


def visited(folder, phase):
    """Losses of a job whose door stays open and has visitors of every kind in one phase; calls by kind."""
    from dualpipe_engine.faults import door

    with patch.object(door.Door, "close", lambda self: None):
        engine = start()
    data, losses, calls = training.stream(0), [], {}
    for kind in KINDS:
        port = engine.watch._lifeline._door.port if dist.get_rank() == 0 else None
        with Strangers(port, kind) if port else nullcontext() as strangers:
            if phase == "idle":
                time.sleep(0.3)
            elif phase == "training":
                losses += [float(engine.train_batch(data)) for _ in range(3)]
            else:
                engine.save_checkpoint(folder, tag=kind.replace(" ", "_"))
        if strangers is not None:
            calls[kind] = strangers.calls
    losses.append(float(engine.train_batch(data)))
    engine.destroy()
    return losses, calls


def undisturbed(steps):
    engine, data = start(), training.stream(0)
    return [float(engine.train_batch(data)) for _ in range(steps)]


@contextmanager
def broken(how, folder):
    """Saving into `folder` fails in the body; yields the folder to save into. On the rank that breaks it."""
    if how == "full":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))  # the kernel refuses to let files grow
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    elif how == "read-only":
        os.system(f"mount -t tmpfs -o ro none {folder} 2>/dev/null") and _refuse(folder)
        try:
            yield
        finally:
            os.system(f"umount {folder} 2>/dev/null") and os.chmod(folder, 0o755)
    else:
        from dualpipe_engine.engine.checkpoint import writer

        sync = writer.sync

        def removed(path):
            shutil.rmtree(folder, ignore_errors=True)
            sync(path)

        with patch.object(writer, "sync", removed):
            yield


def _refuse(folder):
    os.chmod(folder, 0o500)


def failing(folder, how, background):
    """A save that fails, and what training and saving make of it; the checkpoint before it is in another folder."""
    from dualpipe_engine.errors import CheckpointError

    engine, data = start(checkpoint={"async": background}), training.stream(0)
    losses, error = [float(engine.train_batch(data))], ""
    into = Path(folder, "into")
    if dist.get_rank() == 0:
        into.mkdir()
    dist.barrier()
    with broken(how, into) if dist.get_rank() == 0 else nullcontext():
        dist.barrier()
        try:
            engine.save_checkpoint(str(into), tag="bad")
            engine.wait_for_checkpoint()
        except CheckpointError as caught:
            error = str(caught)
        dist.barrier()
    losses.append(float(engine.train_batch(data)))
    engine.save_checkpoint(str(into), tag="good")
    losses.append(float(engine.train_batch(data)))
    engine.wait_for_checkpoint()
    path, _ = engine.load_checkpoint(str(into))
    engine.destroy()
    return error, losses, path
