"""Which weight gradients fill the waits of a pair, on a device whose clock the test keeps."""

from __future__ import annotations

from collections import deque

import pytest

from dualpipe_engine.comm.tickets import Tickets
from dualpipe_engine.runtime import filling
from dualpipe_engine.runtime.filling import FIRST, ONE_IN, Filling


class Device:
    """One stream of work, in seconds; events are its moments."""

    def __init__(self):
        self.now = 0.0
        self.seen = float("inf")  # how far it has come while the host looks
        self.events = 0

    def event(self):
        self.events += 1
        return Event(self, self.now)

    def work(self, seconds):
        self.now += seconds

    def wait(self, end):
        self.now = max(self.now, end)


class Event:
    def __init__(self, device, at):
        self.device, self.at = device, at

    def query(self):
        return self.at <= self.device.seen

    def elapsed_time(self, later):
        assert self.query() and later.query(), "as CUDA says: not ready"
        return 1e3 * (later.at - self.at)

    def since(self, earlier):
        return earlier.elapsed_time(self) / 1e3


class Transfer:
    """Ends at a moment of the device; on the host when it has been asked `looks` times."""

    def __init__(self, device=None, end=0.0, looks=0):
        self.device, self.end, self.looks = device, end, looks

    def wait(self, timeout_s):
        if self.device is not None:
            self.device.wait(self.end)

    def done(self):
        assert self.device is None, "the host is ahead of the device: what it sees says nothing"
        self.looks -= 1
        return self.looks < 0

    def finished_at(self):
        return None

    def moments(self):
        return None if self.device is None else (Event(self.device, 0.0), Event(self.device, self.end), None, None)


def tickets(transfer, leads_on=False):
    found = Tickets("rows", leads_on=leads_on)
    found.add(transfer)
    return found


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(filling, "_now", device.event)
    return device


def pair(device, found, transfer=5.0, weights=(2.0, 2.0, 2.0, 2.0)):
    """A pair that computes for 3 s before its first wait, and for 1 s before its second; how many weight gradients have
    run before each, and how long it took."""
    start, left = device.now, deque(lambda seconds=seconds: device.work(seconds) for seconds in weights)
    found.begin()
    device.work(3.0)
    found.wait(tickets(Transfer(device, start + transfer)), left)
    first = len(weights) - len(left)
    device.work(1.0)
    found.wait(tickets(Transfer(device, start + transfer + 8.0)), left)
    second = len(weights) - first - len(left)
    while left:
        left.popleft()()
    return first, second, device.now - start


def test_the_first_pair_runs_all_and_later_ones_what_fits(device):
    found = Filling(1.0)
    assert pair(device, found) == (4, 0, 13.0)
    # The first transfer ends 2 s after the computation has come to it, so one weight gradient of 2 s fills its wait.
    assert pair(device, found)[:2] == (1, 1)  # the second wait was known from a pair that came to it late
    assert [pair(device, found)[:2] for _ in range(6)][-1] == (1, 3)
    assert pair(device, found)[2] == 13.0


def test_what_is_late_once_changes_what_is_known_by_half(device):
    found = Filling(1.0)
    for _ in range(4):
        pair(device, found)
    pair(device, found, transfer=9.0)
    assert pair(device, found)[0] == 2  # (2 + 6) / 2 = 4 s


def test_later_pairs_are_measured_now_and_then(device):
    found = Filling(1.0)
    counts = []
    for _ in range(2 * ONE_IN + 1):
        before = device.events
        pair(device, found)
        counts.append(device.events > before)
    assert all(counts[:FIRST]) and [at for at, on in enumerate(counts) if on][FIRST:] == [ONE_IN, 2 * ONE_IN]


def test_a_pair_whose_last_transfer_is_under_way_is_not_looked_at(device):
    """The computation has come to the last wait, and the host to the next pair, while the transfer goes on."""
    found = Filling(1.0)
    pair(device, found, weights=())
    device.seen = device.now - 1.0
    pair(device, found)
    assert not found._gaps
    device.seen = float("inf")
    pair(device, found)
    assert found._gaps


def test_where_the_host_sees_the_end_it_decides(device):
    found, left = Filling(1.0), deque([lambda: None] * 5)
    found.begin()
    found.wait(tickets(Transfer(looks=3)), left)
    assert len(left) == 2 and device.events == 0


def test_nothing_fills_a_wait_that_leads_on(device):
    found, left = Filling(1.0), deque([lambda: None] * 5)
    found.begin()
    found.wait(tickets(Transfer(looks=3), leads_on=True), left)
    found.wait(tickets(Transfer(device, 4.0), leads_on=True), left)
    assert len(left) == 5 and device.now == 4.0
