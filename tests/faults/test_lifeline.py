"""The lifeline's port: ranks come in from wherever they are, and nothing that a stranger sends does anything."""

from __future__ import annotations

import json
import random
import resource
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest
from lines import Job

from dualpipe_engine.errors import PipelineRuntimeError
from dualpipe_engine.faults import door, lifeline


@pytest.fixture
def job(monkeypatch):
    monkeypatch.setattr(door, "STRANGER_S", 0.5)
    monkeypatch.setattr(lifeline, "ASK_S", 0.02)
    job = Job()
    yield job
    job.close()


def closed(sock):
    """Whether the other side has hung up; reads what it has sent before."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def all_in(job):
    """Wait until every rank has come in."""
    deadline = time.monotonic() + 10
    while job.lines[0]._missing and time.monotonic() < deadline:
        time.sleep(0.01)


def test_every_rank_comes_in_and_the_door_closes(job):
    port = job.port
    job.start(2)
    all_in(job)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert job.passes()
    assert job.told == {0: "failed 2", 1: "failed 2"}


def test_it_listens_where_other_machines_reach_it(job):
    listener = job.lines[0]._door._listener
    if listener.family == socket.AF_INET6:
        assert listener.getsockname()[0] == "::"
        assert not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        job.call(socket.AF_INET6, "::1").close()
    else:
        assert listener.getsockname()[0] == "0.0.0.0"
    job.call().close()


def test_a_name_that_leads_elsewhere_is_passed_over(job, monkeypatch):
    """127.0.1.1 for the own name is usual; something else may listen there, and speak."""
    other = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: other.accept()[0].sendall(b"SSH-2.0\n" + b"x" * 80 + b"\n"), daemon=True).start()
    connect, tried = socket.create_connection, []

    def resolve(address, **options):
        tried.append(address[0])
        return connect(other.getsockname() if address[0] == "elsewhere" else address, **options)

    monkeypatch.setattr(socket, "create_connection", resolve)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    job.shared = (["nowhere.invalid", "elsewhere", "127.0.0.1"], *job.shared[1:])
    job.start(2)
    assert tried == ["nowhere.invalid", "elsewhere", "127.0.0.1"]
    assert job.passes()
    other.close()


def test_rank_0_out_of_reach_is_said(job):
    with pytest.raises(PipelineRuntimeError, match=r"rank 2 cannot reach rank 0 at port .* set MASTER_ADDR"):
        door.knock(["nowhere.invalid"], job.port, job.shared[2], 2, patience_s=0.1)
    wrong = bytes(32)
    with pytest.raises(PipelineRuntimeError, match="the connection was closed"):
        door.knock(["127.0.0.1"], job.port, wrong, 2, patience_s=0.1)
    assert job.passes()


def test_the_key_never_travels(job, monkeypatch):
    sent = []
    prove = door._prove

    class Tapped:
        def __init__(self, sock):
            self._sock = sock

        def sendall(self, data):
            sent.append(data)
            self._sock.sendall(data)

        def recv(self, size):
            data = self._sock.recv(size)
            sent.append(data)
            return data

        def settimeout(self, seconds):
            self._sock.settimeout(seconds)

    monkeypatch.setattr(door, "_prove", lambda sock, *rest: prove(Tapped(sock), *rest))
    job.start(2)
    key, seen = job.shared[2], b"".join(sent)
    assert len(seen) > 128
    assert key not in seen and key.hex().encode() not in seen


JUNK = {
    "binary": lambda: random.Random(1).randbytes(3000) + b"\n",
    "http": lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "number": lambda: b"7\n",
    "null": lambda: b"null\n",
    "list": lambda: b'[{"rank": 2}]\n',
    "empty": lambda: b"\n\n\n",
    "long line": lambda: b"a" * 8192,
    "claims a rank": lambda: b'{"rank": 2, "key": "0"}\n',
    "claims a cause": lambda: json.dumps({"cause": {"kind": "gone", "rank": 1}}).encode() + b"\n",
    "deep": lambda: b"[" * 4000 + b"\n",
    "zero proof": lambda: b"0" * 64 + b'{"rank": 2}\n',
    "not ascii": lambda: "ä".encode() * 32 + b'{"rank": 2}\n',
}


@pytest.mark.faults_all
@pytest.mark.parametrize("kind", JUNK)
def test_junk_is_sent_away_unread(job, monkeypatch, kind, capfd):
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(door, "json", SimpleNamespace(loads=read.append, dumps=json.dumps))
        sock = job.call()
        sock.sendall(JUNK[kind]())
        assert closed(sock) and not read
    job.start(2)
    assert job.passes() and "error in the lifeline" not in capfd.readouterr().err


def test_an_answer_cannot_be_played_back():
    job = Job(4, missing=(2, 3))
    with job.call() as first:
        challenge = first.recv(64).strip()
        payload = b'{"rank": 2}'
        first.sendall(door._digest(job.shared[2], b"rank", challenge + payload) + payload + b"\n")
        proof = first.recv(128)
        assert proof.strip() == door._digest(job.shared[2], b"rank 0", payload)
        line = door._digest(job.shared[2], b"rank", challenge + payload) + payload + b"\n"
        with job.call() as second:
            second.sendall(line)
            assert closed(second)
        # Even with a right proof each rank comes in once.
        with pytest.raises(PipelineRuntimeError):
            door.knock(["127.0.0.1"], job.port, job.shared[2], 1, patience_s=0.1)
    job.close()


@pytest.mark.faults_all
@pytest.mark.parametrize("count", [400, pytest.param(100_000, marks=pytest.mark.all)])
def test_thousands_of_lines(count, capfd):
    """Each of a connection of its own, some reset, some left half open."""
    job, chance = Job(patience_s=600.0), random.Random(5)
    for number in range(count):
        sock = job.call()
        sock.sendall(chance.randbytes(chance.randrange(1, 200)) + chance.choice([b"\n", b"", b"\0\n"]))
        if number % 3 == 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
        sock.close()
    job.start(2)
    assert job.passes() and "error in the lifeline" not in capfd.readouterr().err
    job.close()


def test_slow_and_silent_strangers_have_their_time_and_no_more(job):
    strangers = [job.call() for _ in range(door.STRANGERS + 40)]
    strangers[0].sendall(b"a")
    job.start(2)  # who gets in although more are waiting than there are places
    assert len(job.lines[0]._door._strangers) <= door.STRANGERS
    assert all(closed(sock) for sock in strangers)
    assert job.passes()


def test_descriptors_that_run_out_are_survived(job, capfd):
    sock = socket.socket()
    sock.settimeout(10)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, hard))
        while True:
            try:
                spare.append(socket.socket())
            except OSError:
                break
        sock.connect(("127.0.0.1", job.port))
        deadline = time.monotonic() + 5
        while job.lines[0]._door._listening and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not job.lines[0]._door._listening
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in spare:
            each.close()
    job.start(2)
    assert job.passes() and "error in the lifeline" not in capfd.readouterr().err


@pytest.mark.parametrize("line", [b"null", b"[]", b"{}", b'{"at": ', b"\xff\xfe", b'{"cause": 3}', b"[" * 100_000])
def test_a_rank_that_sends_half_a_message_does_not_end_the_thread(job, line, capfd):
    sock = door.knock(["127.0.0.1"], job.port, job.shared[2], 2, patience_s=5)
    sock.sendall(line + b"\n" + json.dumps({"cause": {"kind": "failed", "rank": 2, "at": {}}}).encode() + b"\n")
    assert job.lines[0].decided.wait(5) and job.lines[1].decided.wait(5)
    assert {line.text for line in job.lines.values()} == {"failed 2"}


def test_a_rank_that_answers_no_question_is_the_one_that_others_are_late_for(job, monkeypatch):
    """A stopped process keeps its connection; who waits for it may notice sooner than its silence is long enough."""
    monkeypatch.setattr(lifeline, "SETTLE_S", 0.3)
    stopped = door.knock(["127.0.0.1"], job.port, job.shared[2], 2, patience_s=5)
    all_in(job)
    line = job.lines[1]
    line._send(line._peers[0], {"cause": {"kind": lifeline.LATE, "rank": None, "at": {}}})
    assert job.lines[0].decided.wait(5) and line.decided.wait(5)
    assert job.told == {0: f"{lifeline.SILENT} 2", 1: f"{lifeline.SILENT} 2"}
    stopped.close()


def test_an_error_of_the_thread_is_its_own_fault_and_ends_nothing(job, capfd):
    def broken():
        raise KeyError("planted")

    job.lines[0]._report = broken
    job.lines[0].wake()
    job.lines[0]._interval = 0.01
    deadline, text = time.monotonic() + 5, ""
    while "planted" not in text and time.monotonic() < deadline:
        time.sleep(0.02)
        text += capfd.readouterr().err
    assert "an error in the lifeline of rank 0; training goes on" in text
    assert not job.told
    assert job.passes()


def test_a_rank_that_never_comes_in_is_lost(monkeypatch):
    job = Job(patience_s=1.0)
    assert job.lines[0].decided.wait(10) and job.lines[1].decided.wait(10)
    assert job.told == {0: f"{lifeline.SILENT} 2", 1: f"{lifeline.SILENT} 2"}
    job.close()
