"""Where the time of a step goes, on records made by hand."""

import pytest

from dualpipe_engine.profiling.breakdown import (
    COMMUNICATION,
    DATA_TIME,
    OPTIMIZER,
    OTHER,
    REDUCING,
    WAITING,
    break_down,
    messages,
    reductions,
)
from dualpipe_engine.schedule.op import Op
from dualpipe_engine.schedule.records import (
    DATA,
    DRAIN,
    LOSS,
    OP,
    PHASE,
    RECEIVE,
    REDUCTION,
    SEND,
    BatchRecord,
    Mark,
    RankRecord,
)


def mark(kind, text, start, end, **more):
    return Mark(kind, Op.parse(text), start, end, **more)


FIRST = BatchRecord(
    0.0,
    30.0,
    [
        mark(DATA, "0F0", 0, 1),
        mark(OP, "0F0", 1, 5),
        mark(SEND, "0SEND_F0", 5, 6),
        mark(RECEIVE, "0B0", 6, 18),
        mark(OP, "0B0", 18, 22),
        mark(OP, "0REDUCE", 22, 23),
        mark(REDUCTION, "0REDUCE", 22.5, 26),
        mark(DRAIN, "STEP", 24, 26),
        mark(OP, "STEP", 24, 28),
        mark(LOSS, "STEP", 28, 30),
    ],
)
SECOND = BatchRecord(
    0.0,
    30.0,
    [
        mark(RECEIVE, "1F0", 0, 8),
        mark(OP, "1F0", 8, 12),
        mark(OP, "1B0", 12, 15),
        mark(PHASE, "STEP", 9, 11, name="dispatch", waited=1.0),
        mark(SEND, "1SEND_B0", 15, 15.5),
        mark(OP, "STEP", 16, 17),
        mark(LOSS, "STEP", 17, 30),
    ],
)


def test_messages_run_from_the_hand_over_to_the_arrival():
    found = {(m.source, m.target): (m.sent, m.arrived) for m in messages([FIRST, SECOND])}
    assert found == {(0, 1): (5, 8), (1, 0): (15, 18)}


def test_a_wait_is_bubble_until_the_message_is_sent_and_communication_after():
    first, second = break_down([FIRST, SECOND])
    assert second.seconds[WAITING] == 5 + 13
    assert second.seconds[COMMUNICATION] == 3 + 0.5 + 1
    assert first.seconds[WAITING] == 9 + 2
    assert first.seconds[COMMUNICATION] == 1 + 3


def test_everything_adds_up():
    for part in break_down([FIRST, SECOND]):
        assert sum(part.seconds.values()) == pytest.approx(30)
    first, second = break_down([FIRST, SECOND])
    assert first.seconds[DATA_TIME] == 1
    assert first.seconds[OPTIMIZER] == 2
    assert first.seconds[REDUCING] == 1 + 2
    assert first.hidden[REDUCING] == 1.5
    assert first.seconds[OTHER] == 1
    # The layer's transfer took 2 s; the second that the rank stood still for it is not part of F.
    assert second.seconds["F"] == 3
    assert second.hidden[COMMUNICATION] == 1


def test_a_message_that_was_there_takes_as_long_as_the_fastest():
    send = [mark(SEND, f"0SEND_F{m}", m, m) for m in range(2)]
    waits = [mark(RECEIVE, "1F0", 0, 3), mark(RECEIVE, "1F1", 20, 20)]
    found = messages([BatchRecord(0, 30, send), BatchRecord(0, 30, waits)])
    assert [m.arrived - m.sent for m in found] == [3, 3]
    hidden = break_down([BatchRecord(0, 30, send), BatchRecord(0, 30, waits)])[1].hidden[COMMUNICATION]
    assert hidden == 3  # all of the second message, nothing of the first


def test_reductions_run_one_after_another():
    marks = [mark(REDUCTION, "0REDUCE", 1, 4), mark(REDUCTION, "1REDUCE", 2, 6)]
    assert [(start, end) for start, end, _ in reductions(BatchRecord(0, 9, marks))] == [(1, 4), (4, 6)]


def test_clocks_are_aligned():
    moved = RankRecord(1, 0, "there", [SECOND.shifted(100.0)], clock=100.0).aligned()
    assert moved.steps == [SECOND]
