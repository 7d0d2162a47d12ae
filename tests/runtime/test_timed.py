"""Transfers between stages are noted, with their ends where the transport knows them."""

from __future__ import annotations

import time

import torch

from dualpipe_engine.comm.transport import LocalHub, LocalTransport
from dualpipe_engine.runtime.timed import TimedTransport


class Knowing:
    """A send that ended before it was waited for."""

    rank = 0

    def send(self, tensor, dst, tag):
        self.ended = time.monotonic()
        return self

    def wait(self, timeout_s):
        time.sleep(0.01)

    def done(self):
        return True

    def finished_at(self):
        return self.ended


def test_transfers_are_noted_once():
    hub, log = LocalHub(2), []
    sender, receiver = (TimedTransport(LocalTransport(hub, rank), log) for rank in range(2))
    target = torch.zeros(3)
    coming = receiver.recv(target, 0, 5)
    assert not coming.done()
    sent = sender.send(torch.ones(3), 1, 5)
    for ticket in (coming, sent, sent):
        ticket.wait(1.0)
    assert target.sum() == 3
    assert [(each.name, each.size) for each in log] == [("receive", 0), ("send", 12)]
    assert all(each.hidden == 0 for each in log), "what this transport does not know is not called hidden"


def test_a_known_end_counts():
    log, transport = [], Knowing()
    posted = time.monotonic()
    TimedTransport(transport, log).send(torch.ones(1), 1, 0).wait(1.0)
    assert log[0].finished == transport.ended and posted <= log[0].posted and log[0].waited >= 0.01
