"""The strict twin of NCCL reports what NCCL would not forgive, and what the engine does is none of it."""

from __future__ import annotations

import pytest
import strict_runs
from ranks import RankError

# what breaks a rule, ranks, rules of the twin, what it reports
PLANTED = {
    "groups made by their ends, eager": ("local_synchronization", 3, {}, r"differs|all ranks wait"),
    "groups made by their ends, lazy": (
        "local_synchronization",
        3,
        {"eager": False},
        r"all ranks wait.*first op",
    ),
    "another order of groups": (
        "other_order",
        3,
        {},
        r"call 0 that makes a group differs.*rank 2: makes group .1, 2.",
    ),
    "no device": ("no_device", 2, {}, r"all_gather_object before set_device: .*in no_device"),
    "one options object": ("shared_options", 3, {}, r"one options object is given to two groups"),
    "a wait with a timeout": ("timeout", 2, {"timeouts": False}, r"wait with a timeout for all_reduce .*in timeout"),
    "first messages that cross": (
        "both_send_first",
        2,
        {"eager": False},
        r"all ranks wait.*first operation, send 1",
    ),
    "too many in flight": ("too_many_in_flight", 2, {"in_flight": 4}, r"4 operations are in flight, so send 0 waits"),
    "held by a receive": ("held_by_a_receive", 2, {}, r"rank 1: waits for recv 0 on .*rank 0 recv 1 and 1 more"),
    "collectives that differ": ("collectives_differ", 2, {}, r"cannot meet: rank 0 all_reduce \S+ 1; rank 1 .* 2"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted(on_twin, case):
    name, world, rules, report = PLANTED[case]
    with pytest.raises(RankError, match=f"(?s){report}"):
        on_twin(world, getattr(strict_runs, name), **rules)
    assert on_twin.hub.faults


def test_forgiven_by_other_rules(on_twin):
    """The same calls pass where the rule they break is not in force."""
    on_twin(2, strict_runs.both_send_first)
    on_twin(2, strict_runs.too_many_in_flight)
    on_twin(2, strict_runs.timeout, timeouts=True)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "lazy"])
@pytest.mark.parametrize("world", [2, 3, *(pytest.param(world, marks=pytest.mark.all) for world in (4, 8))])
def test_transport(on_twin, world, eager):
    assert on_twin(world, strict_runs.transport, eager, in_flight=4) == [True] * world
    assert on_twin.hub.communicators <= 1 + 2 * (world - 1)
