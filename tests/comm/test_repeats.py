"""What is said of transfers by running little of what repeats is what running all of them says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_unlock import usual

from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.passes.queues import FEW, MANY, PLACES, Events, Queues
from dualpipe_engine.schedule.passes.repeats import finishes
from dualpipe_engine.schedule.passes.unlock import period_of
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel


class Counting(Queues):
    """Counts the events that are leaped over."""

    leaped = 0

    def leap(self, steps, moved):
        self.leaped += sum(steps)
        super().leap(steps, moved)


def starts_of(plan):
    return np.cumsum([0, *(len(program) for program in plan.programs[:-1])])


def compare(plan, messages, early, most):
    """What `finishes` has leaped over, and the verdict, after where it ends has been compared with a run of all."""
    starts = starts_of(plan)
    every = Queues(Events(messages, starts, early), most)
    verdict = every.run()
    queues = Counting(Events(messages, starts, early), most)
    assert finishes(queues, period_of(messages, starts, plan.num_micro)) == verdict
    assert queues.at() == every.at()
    assert queues.open == every.open
    assert queues.events.state == every.events.state
    return queues.leaped, verdict


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimize", [False, True])
def test_the_steady_state_of_every_schedule_is_leaped_over(schedule, optimize, monkeypatch):
    plan = make_plan(schedule, 4, 64, optimize=optimize)
    _, messages = usual(plan, monkeypatch)
    for early in (None, False, True):
        leaped, verdict = compare(plan, messages, early, FEW)
        assert verdict
        assert leaped > 0.6 * sum(map(len, Events(messages, starts_of(plan), early).programs))


@st.composite
def moved_messages(draw):
    """(plan, messages): some, or all of one edge that are a period apart, are asked for or sent elsewhere."""
    schedule = draw(st.sampled_from(SCHEDULES))
    ranks = draw(st.integers(1, 3)) * 2 if schedule == "dualpipe" else draw(st.integers(2, 6))
    plan = make_plan(
        schedule, ranks, draw(st.integers(1, 16 * ranks)), CostModel(fb=draw(st.sampled_from([None, 2.3])))
    )
    with pytest.MonkeyPatch.context() as patch:
        _, messages = usual(plan, patch)
    if not len(messages.source):
        return plan, messages
    ends = np.append(starts_of(plan)[1:], plan.num_ops) * PLACES - 1
    period = period_of(messages, starts_of(plan), plan.num_micro)
    asks, sends = messages.asks.copy(), messages.sends.copy()
    for _ in range(draw(st.integers(0, 3))):
        number = draw(st.integers(0, len(period) - 1))
        edge = messages.edges()[number]
        first = draw(st.integers(edge.start, edge.stop - 1))
        step = max(1, int(period[number])) if draw(st.booleans()) else len(asks)
        which = slice(edge.start + (first - edge.start) % step if step < len(asks) else first, edge.stop, step)
        places, rank = draw(st.sampled_from([(asks, messages.target), (sends, messages.source)]))
        least, most = starts_of(plan)[rank[edge.start]] * PLACES, ends[rank[edge.start]]
        places[which] = np.clip(places[which] + PLACES * draw(st.integers(-6, 12)), least, most)
    return plan, messages._replace(asks=asks, sends=sends)


@given(moved_messages(), st.sampled_from([None, False, True]), st.sampled_from([1, FEW, MANY]))
def test_moved_transfers_are_judged_alike(found, early, most):
    plan, messages = found
    if len(messages.source):
        compare(plan, messages, early, most)


def test_both_verdicts_are_found_behind_a_leap(monkeypatch):
    """A transfer that is sent too late in the steady state holds all ranks before one, at its end behind one."""
    plan = make_plan("1f1b", 4, 64)
    _, messages = usual(plan, monkeypatch)
    starts = starts_of(plan)
    edge = messages.edges()[0]
    for at, leaps in ((32, False), (62, True)):
        sends = messages.sends.copy()
        sends[edge.start + at] = (starts[messages.source[edge.start] + 1]) * PLACES - 1
        leaped, verdict = compare(plan, messages._replace(sends=sends), None, FEW)
        assert not verdict
        assert bool(leaped) == leaps
