"""The communication stream: the same tests for the helper built at install, built on first use, and the Python twin."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import forks
from stream_stress import RANKS, gloo_group, in_threads, local_groups, stress
from torch.utils import cpp_extension

from dualpipe_engine.comm import stream as stream_module
from dualpipe_engine.comm.all_to_all import exchange
from dualpipe_engine.comm.stream import implementation, open_stream, shared_stream, transfer_of
from dualpipe_engine.comm.tickets import Tickets
from dualpipe_engine.comm.transport import GroupTransport
from dualpipe_engine.errors import ConfigError, PipelineRuntimeError

CPU = torch.device("cpu")
WAYS = ["prebuilt", "build", "python"]
SOON_S = 20.0


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    if request.param == "prebuilt":
        pytest.importorskip("dualpipe_engine._comm", reason="installed without the helper")
    implementation(request.param)
    return request.param


@pytest.fixture(scope="module")
def groups():
    return local_groups(RANKS)


@pytest.fixture
def streams(way):
    opened = [open_stream(CPU, way) for _ in range(RANKS)]
    yield opened
    for stream in opened:
        stream.close()


def until(condition):
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(1e-3)


def test_order_and_content(streams, groups):
    sent = [streams[0].send(groups[0], torch.full((5,), float(n)), 1, 0, "to 1") for n in range(100)]
    got = [torch.empty(5) for _ in sent]
    tickets = [streams[1].recv(groups[1], tensor, 0, 0, "from 0") for tensor in got]
    for number in reversed(range(100)):
        tickets[number].wait(SOON_S)
        assert got[number].tolist() == [number] * 5
    for ticket in sent:
        ticket.wait(SOON_S)
        ticket.wait(SOON_S)  # again changes nothing


def test_done_without_wait(streams, groups):
    tensor = torch.empty(4)
    received = streams[1].recv(groups[1], tensor, 0, 1, "from 0")
    time.sleep(0.01)
    assert not received.done()
    assert received.finished_at() is None
    sent = streams[0].send(groups[0], torch.ones(4), 1, 1, "to 1")
    until(lambda: sent.done() and received.done())
    assert tensor.tolist() == [1] * 4
    assert received.posted_ns * 1e-9 < received.finished_at() <= time.monotonic()


def test_lifetimes(streams, groups):
    """Memory lives as long as its transfer, with nobody holding tensors or tickets, and no longer."""
    kept = []

    def post(rank, tensor, call):
        kept.append(weakref.ref(tensor.untyped_storage()))
        call(groups[rank], tensor, 1 - rank, 2, "lifetime")

    post(0, torch.ones(1000), streams[0].send)
    post(1, torch.ones(1000), streams[1].send)
    time.sleep(0.02)
    assert all(ref() is not None for ref in kept)
    post(0, torch.empty(1000), streams[0].recv)
    post(1, torch.empty(1000), streams[1].recv)
    until(lambda: all(ref() is None for ref in kept))


def test_memory_does_not_grow(streams, groups):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def move(times):
        for _ in range(times):
            streams[0].send(groups[0], torch.ones(32_768), 1, 3, "to 1")  # nobody waits for it
            streams[1].recv(groups[1], torch.empty(32_768), 0, 3, "from 0").wait(SOON_S)

    move(300)
    before = resident()
    move(1500)  # 197 MB
    assert resident() - before < 30e6


def test_counters(streams, groups):
    sent = streams[0].send(groups[0], torch.ones(10), 1, 4, "to 1")
    time.sleep(0.05)
    received = streams[1].recv(groups[1], torch.empty(10), 0, 4, "from 0")
    received.wait(SOON_S)
    sent.wait(SOON_S)
    assert (sent.kind, received.kind, sent.size) == ("send", "recv", 40)
    assert sent.finished_ns - sent.posted_ns >= 50e6
    assert 0 < received.waited_ns < time.monotonic_ns() - received.posted_ns
    counters = streams[0].counters()
    assert counters["send"] == {
        "posted": 1,
        "finished": 1,
        "failed": 0,
        "bytes": 40,
        "flight_ns": sent.finished_ns - sent.posted_ns,
        "waited_ns": sent.waited_ns,
    }
    assert set(counters["recv"].values()) == {0}
    assert streams[1].counters()["recv"]["waited_ns"] == received.waited_ns
    transfer = transfer_of(sent)
    assert transfer.size == 40
    assert 0.05 <= transfer.finished - transfer.posted < SOON_S


def test_all_to_all_and_its_gradient(streams, groups):
    """Uneven blocks, an empty one among them, posted into tickets; `hidden` counts what ran under the pause."""
    send = [[1, 2, 0], [0, 1, 3], [2, 2, 1]]
    log = []

    def run(rank):
        rows = (torch.arange(sum(send[rank])).double() + 10 * rank).unsqueeze(1).requires_grad_()
        receive = [row[rank] for row in send]
        tickets = Tickets("dispatch", log if rank == 0 else None)
        out = exchange(rows, send[rank], receive, groups[rank], tickets, SimpleNamespace(posts=streams[rank]))
        time.sleep(0.05)
        tickets.wait(SOON_S)
        value = out.detach().flatten().tolist()
        (grad,) = torch.autograd.grad(out, rows, 2 * out.detach())
        tickets.wait(SOON_S)
        assert torch.equal(grad, 2 * rows.detach())
        plain = exchange(rows.detach(), send[rank], receive, groups[rank])
        assert torch.equal(plain, out.detach())
        return value

    assert in_threads(run, RANKS) == [[0, 20, 21], [1, 2, 10, 22, 23], [11, 12, 13, 24]]
    assert [transfer.name for transfer in log] == ["dispatch"] * 2
    assert streams[0].counters()["all_to_all"]["finished"] == 2


def test_exchanges_share_one_stream_that_closes_with_its_last_user(groups, monkeypatch):
    opened = []
    plain = stream_module.open_stream
    monkeypatch.setattr(stream_module, "open_stream", lambda device: opened.append(plain(device)) or opened[-1])
    stream_module._SHARED.clear()
    kept = shared_stream(CPU)
    ones = [1] * RANKS
    for _ in range(2):
        in_threads(lambda rank: exchange(torch.ones(RANKS, 1), ones, ones, groups[rank]), RANKS)
    assert len(opened) == 1 and kept.posts is opened[0]
    del kept
    gc.collect()
    with pytest.raises(PipelineRuntimeError, match="late failed"):
        opened[0].send(groups[0], torch.ones(1), 1, 0, "late").wait(SOON_S)


@pytest.mark.parametrize("pause", [0.0, 0.05], ids=["caller_waits", "lane_waits"])
def test_time_out(way, pause):
    own = local_groups(2)  # gloo gives up all pairs of a group where one transfer timed out
    stream = open_stream(CPU, way)
    ticket = stream.recv(own[0], torch.empty(3), 1, 5, "receive from pipeline rank 1")
    time.sleep(pause)
    start = time.monotonic()
    with pytest.raises(PipelineRuntimeError, match="receive from pipeline rank 1 failed"):
        ticket.wait(0.2)
    assert time.monotonic() - start >= 0.2
    stream.close()


def test_python_runs_while_a_transfer_is_awaited(streams, groups):
    ticks = []
    ended = threading.Event()

    def tick():
        while not ended.is_set():
            ticks.append(time.monotonic())
            time.sleep(1e-3)

    thread = threading.Thread(target=tick)
    thread.start()
    received = streams[1].recv(groups[1], torch.empty(2), 0, 6, "from 0")
    later = threading.Timer(0.3, lambda: streams[0].send(groups[0], torch.ones(2), 1, 6, "to 1"))
    later.start()
    start = time.monotonic()
    received.wait(SOON_S)  # would never end if the timer's thread could not run
    end = time.monotonic()
    ended.set()
    thread.join()
    later.join()
    assert sum(start < tick < end for tick in ticks) > 5


def test_close(streams, groups):
    first, second = (streams[0].recv(groups[0], torch.empty(2), 2, 7, "from 2") for _ in range(2))
    time.sleep(0.02)
    streams[0].close()
    after = streams[0].send(groups[0], torch.empty(2), 2, 7, "to 2")
    for ticket in (first, second, after):
        assert ticket.done()
        with pytest.raises(PipelineRuntimeError, match=r"(from|to) 2 failed"):
            ticket.wait(SOON_S)
    assert streams[0].counters()["recv"]["failed"] == 2


def _peer(port):
    """Rank 2 of three: takes part in making the group, says hello to rank 0 and then does nothing."""
    group = gloo_group(dist.TCPStore("127.0.0.1", port, is_master=False), 2, 3)
    group.send([torch.ones(1)], 0, 0).wait()
    time.sleep(120)


def test_death_of_a_peer(way):
    """Every ticket of the dead rank's edges fails with its rank; those of other edges do not."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    peer = forks().Process(target=_peer, args=(store.port,), daemon=True)
    peer.start()
    near = in_threads(lambda rank: gloo_group(dist.TCPStore("127.0.0.1", store.port), rank, 3), 2)
    stream, other = open_stream(CPU, way), open_stream(CPU, way)
    stream.recv(near[0], torch.empty(1), 2, 0, "hello").wait(SOON_S)
    what = "with pipeline rank 2"
    tickets = [stream.recv(near[0], torch.empty(1000), 2, tag, what) for tag in range(1, 6)]
    tickets += [stream.send(near[0], torch.empty(1000), 2, tag, what) for tag in range(1, 6)]
    quiet = stream.recv(near[0], torch.empty(2), 1, 9, "with pipeline rank 1")
    time.sleep(0.05)
    peer.kill()
    peer.join()
    until(lambda: all(ticket.done() for ticket in tickets))
    tickets += [stream.recv(near[0], torch.empty(1), 2, 7, what), stream.send(near[0], torch.empty(1), 2, 7, what)]
    for ticket in tickets:
        with pytest.raises(PipelineRuntimeError, match="with pipeline rank 2 failed"):
            ticket.wait(SOON_S)
    assert not quiet.done()
    other.send(near[1], torch.ones(2), 0, 9, "to 0").wait(SOON_S)
    quiet.wait(SOON_S)
    stream.close()
    other.close()


def test_stress(way, streams, groups):
    stress(streams, groups, transfers=600 if way == "python" else 4000)
    totals = [sums for stream in streams for sums in stream.counters().values()]
    assert all(sums["posted"] == sums["finished"] for sums in totals)


def _over_transport(way):
    rank, peer = dist.get_rank(), 1 - dist.get_rank()
    log = []
    transport = GroupTransport([0, 1], rank, dist.group.WORLD, CPU, log, way, edges=[(0, 1), (1, 0)])
    tensor = torch.empty(3)
    received = transport.recv(tensor, peer, 1)
    transport.send(torch.full((3,), float(rank)), peer, 1).wait(SOON_S)
    received.wait(SOON_S)
    return tensor.tolist(), [(each.name, each.size) for each in map(transfer_of, log)]


def test_transport(way, ranks):
    log = [("recv", 12), ("send", 12)]
    assert ranks.run(2, _over_transport, way=way) == [([1.0] * 3, log), ([0.0] * 3, log)]


@pytest.fixture
def device_groups(groups, monkeypatch):
    """The groups for tensors on CUDA too, known to torch.distributed, as those of `init_process_group("gloo")` are."""
    for group in groups:
        gloo = group._get_backend(CPU)
        group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.GLOO, gloo)
        monkeypatch.setitem(dist.distributed_c10d._world.pg_map, group, ("gloo", None))
    return groups


def test_device_groups_are_gloo(device_groups):
    """Both helpers find that tensors on CUDA must go through the host: one asks the group, one torch.distributed."""
    for group in device_groups:
        assert group._get_backend(torch.device("cuda")).name() == "gloo"
        assert dist.get_backend(group) == "gloo"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_staging(streams, device_groups):
    """CUDA tensors over gloo: each side sees what the stream before it made."""
    device = torch.device("cuda", 0)
    cuda = [open_stream(device, "python" if "twin" in type(stream).__module__ else None) for stream in streams]
    for number in range(50):
        made = torch.full((1 << 20,), 1.0, device=device).mul_(number)
        out = torch.zeros_like(made)
        sent = cuda[0].send(device_groups[0], made, 1, number, "to 1")
        received = cuda[1].recv(device_groups[1], out, 0, number, "from 0")
        received.wait(SOON_S)
        assert torch.equal(out * 2, made * 2)
        sent.wait(SOON_S)
    for stream in cuda:
        stream.close()


def test_which_one(monkeypatch):
    with pytest.raises(ConfigError, match="prebuilt, build, python"):
        open_stream(CPU, "rust")
    monkeypatch.setenv(stream_module.VARIABLE, "python")
    assert "python_stream" in type(open_stream(CPU)).__module__
    monkeypatch.delenv(stream_module.VARIABLE)

    def fails():
        raise OSError("no compiler")

    monkeypatch.setattr(stream_module, "_prebuilt", fails)
    monkeypatch.setattr(stream_module, "build_helper", fails)
    implementation.cache_clear()
    try:
        with pytest.warns(UserWarning, match="prebuilt: no compiler; build: no compiler") as caught:
            assert "python_stream" in type(open_stream(CPU)).__module__
            open_stream(CPU)
        assert len(caught) == 1
        with pytest.raises(ConfigError, match="no compiler"):
            open_stream(CPU, "build")
    finally:
        implementation.cache_clear()


ONE_BUILDS = """
import pathlib, shutil, sys, time
from torch.utils import cpp_extension
from dualpipe_engine.comm import stream
def load(name, sources, extra_cflags, build_directory):
    print("BUILDS", flush=True)
    time.sleep(1)
    shutil.copy(sys.argv[1], pathlib.Path(build_directory) / f"{name}.so")
    import types
    return types.SimpleNamespace(CommStream=print)
cpp_extension.load = load
stream.implementation("build")
"""


def test_one_process_builds(tmp_path):
    implementation("build")
    folder = Path(cpp_extension._get_build_directory("dualpipe_comm", verbose=False)).parent
    built = str(next(folder.glob("dualpipe_comm_*/dualpipe_comm.so")))
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ONE_BUILDS, built]
    processes = [subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert sum(out.count("BUILDS") for out, _ in outputs) == 1
    assert sum(err.count("building the communication helper") for _, err in outputs) == 1
