"""Times of transfers on a device, put on the host's clock."""

from __future__ import annotations

import pytest

from dualpipe_engine.comm.tickets import Transfer

ORIGIN = (100.0, "event")


class At:
    """An instant so many seconds after the event."""

    def __init__(self, seconds):
        self._seconds = seconds

    def since(self, earlier):
        assert earlier == "event"
        return self._seconds


def test_times_are_those_of_the_device():
    transfer = Transfer("dispatch", 7.0, 8.0, 9.0, 64, (At(1.0), At(3.0), At(2.5), At(3.25)))
    found = transfer.resolved(ORIGIN)
    assert (found.name, found.size) == ("dispatch", 64)
    assert (found.posted, found.finished, found.waited) == (101.0, 103.0, 0.75)
    assert found.hidden == pytest.approx(1.25)


def test_a_transfer_that_nobody_waited_for_ended_when_the_host_saw_it():
    found = Transfer("send", 7.0, 8.0, 104.0, 64, (At(1.0), None, None, None)).resolved(ORIGIN)
    assert (found.posted, found.finished, found.waited) == (101.0, 104.0, 0.0)


def test_on_the_host_times_stay():
    transfer = Transfer("dispatch", 7.0, 8.0, 9.0)
    assert transfer.resolved(None) is transfer
