"""Tickets of a process group that works on a device by itself; run alone with the way to the stream, prints a JSON."""

from __future__ import annotations

import gc
import sys
import weakref
from datetime import timedelta

import fake_device
import torch
import torch.distributed as dist

from dualpipe_engine.comm.stream import open_stream
from dualpipe_engine.comm.tickets import Tickets


class Work(dist._Work):
    """Under way for ever, as the host sees it."""

    def __init__(self, calls):
        super().__init__()
        self._calls = calls

    def wait(self, timeout=timedelta(0)):
        self._calls.append(timeout.total_seconds())
        return True


class Group(dist.ProcessGroup):
    def __init__(self):
        super().__init__(0, 2)
        self.calls, self.kept = [], []

    def send(self, tensors, peer, tag):
        return self._work()

    def recv(self, tensors, peer, tag):
        return self._work()

    def alltoall_base(self, out, rows, receive, send, options=None):
        return self._work()

    all_to_all_single = alltoall_base  # since torch 2.13

    def _work(self):
        self.kept.append(Work(self.calls))
        return self.kept[-1]


def main(way):
    library = fake_device.setup()
    group = Group()
    backend = torch._C._distributed_c10d.FakeProcessGroup._create_internal(0, 2)
    group._register_backend(fake_device.DEVICE, dist.ProcessGroup.BackendType.CUSTOM, backend)
    if way == "python":
        dist.get_backend = lambda group: "nccl"
    stream = open_stream(fake_device.DEVICE, way)
    found, alive = {}, []

    def tensor():
        made = fake_device.Tensor(torch.ones(4))
        alive.append(weakref.ref(made.raw.untyped_storage()))
        return made

    for name, post in {
        "send": lambda: stream.send(group, tensor(), 1, 0, "to 1"),
        "recv": lambda: stream.recv(group, tensor(), 1, 0, "from 1"),
        "all_to_all": lambda: stream.all_to_all(group, tensor(), tensor(), [2, 2], [2, 2], "all"),
        "ready": lambda: stream.all_to_all(group, tensor(), tensor(), [2, 2], [2, 2], "all", False),
    }.items():
        group.calls.clear()
        alive.clear()
        ticket = post()
        gc.collect()
        before = sum(ref() is not None for ref in alive)
        done = ticket.done()
        log = []
        tickets = Tickets("phase", log)
        tickets.add(ticket)
        tickets.wait(5.0)
        ticket.wait(5.0)
        gc.collect()
        after = sum(ref() is not None for ref in alive)
        times = [moment is not None for moment in ticket.moments()]
        found[name] = {"waits": list(group.calls), "done": done, "kept": [before, after], "moments": times}
        found[name]["logged"] = log[0].moments is not None
    stream.close()
    del library
    fake_device.answer(found)


if __name__ == "__main__":
    main(sys.argv[1])
