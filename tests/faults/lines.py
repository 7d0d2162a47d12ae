"""Lifelines of several ranks in one process, and strangers at their door."""

from __future__ import annotations

import socket
import threading

from dualpipe_engine.faults.lifeline import Lifeline


class Job:
    """`world` lifelines that share one secret; `missing` ranks have not come in yet, so that the door stays open."""

    def __init__(self, world=3, missing=(2,), patience_s=30.0):
        self.shared, self.given = None, threading.Event()
        self.world, self.patience_s = world, patience_s
        self.told, self.lines = {}, {}
        for rank in range(world):
            if rank not in missing:
                self.start(rank)

    def start(self, rank):
        def share(value):
            if rank == 0:
                self.shared = value
                self.given.set()
            assert self.given.wait(10)
            return self.shared

        self.lines[rank] = line = Lifeline(
            rank,
            self.world,
            share,
            self.patience_s,
            report=lambda: {"where": f"at {rank}", "waiting": True, "late": False},
            verdict=lambda cause, reports: f"{cause['kind']} {cause['rank']}",
            told=lambda text: self.told.setdefault(rank, text),
            signalled=lambda numbers: None,
        )
        line.start()
        return line

    @property
    def port(self):
        return self.shared[1]

    def call(self, family=socket.AF_INET, host="127.0.0.1"):
        """A stranger, connected."""
        sock = socket.socket(family)
        sock.settimeout(10)
        sock.connect((host, self.port))
        return sock

    def passes(self, seconds=5.0):
        """Whether a failure that one rank reports still reaches all others: the job is watched over."""
        lost = max(self.lines)
        self.lines[lost].fail("boom")
        others = [line for rank, line in self.lines.items() if rank != lost]
        return all(line.decided.wait(seconds) for line in others) and set(self.told.values()) == {f"failed {lost}"}

    def close(self):
        for line in self.lines.values():
            line.close()
