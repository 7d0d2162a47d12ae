"""Threads of gloo under the policy for batches."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from dualpipe_engine.comm import gloo_threads
from dualpipe_engine.comm.transport import GroupTransport

LINUX = hasattr(os, "SCHED_BATCH") and os.path.isdir("/proc/self/task")
NAMED = torch.__version__ >= (2, 13)


def _policies():
    rank = dist.get_rank()
    before = gloo_threads.gloo_threads()
    transport = GroupTransport([0, 1], rank, dist.group.WORLD, edges=[(0, 1), (1, 0)])
    transport.close()
    others = {int(task) for task in os.listdir("/proc/self/task")} - set(before)
    return (
        len(before),
        {os.sched_getscheduler(task) for task in before},
        {os.sched_getscheduler(task) for task in others},
    )


@pytest.mark.skipif(not LINUX, reason="the policy is Linux's")
@pytest.mark.skipif(not NAMED, reason="threads of gloo have no name in this torch")
def test_threads_of_gloo_preempt_nobody(ranks):
    for threads, policies, others in ranks.run(2, _policies):
        assert threads >= 1
        assert policies == {os.SCHED_BATCH}
        assert others == {os.SCHED_OTHER}, "those of the rank itself stay as they are"


def test_systems_that_have_no_such_policy_or_forbid_it(monkeypatch, tmp_path):
    monkeypatch.setattr(gloo_threads, "_TASKS", tmp_path / "none")
    assert gloo_threads.gloo_threads() == []
    monkeypatch.setattr(gloo_threads, "_TASKS", tmp_path)
    for number, name in (("7", "gloo_tcp_loop\n"), ("8", "python\n")):
        (tmp_path / number).mkdir()
        (tmp_path / number / "comm").write_text(name)
    (tmp_path / "9").mkdir()  # has ended
    monkeypatch.setattr(os, "SCHED_BATCH", 3, raising=False)
    assert gloo_threads.gloo_threads() == [7]
    asked = []

    def forbidden(*args):
        asked.append(args)
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden, raising=False)
    monkeypatch.setattr(os, "sched_param", lambda priority: priority, raising=False)
    gloo_threads.take_turns()
    assert asked == [(7, 3, 0)]
