"""A rank is seen as waiting by what it declares, ends in time, and makes nothing of what an abort has left."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
import training

from dualpipe_engine.errors import PipelineRuntimeError
from dualpipe_engine.faults import watch as watching
from dualpipe_engine.faults.watched import watched
from dualpipe_engine.schedule.op import F, Op
from dualpipe_engine.schedule.progress import Position, is_waiting, waiting


def test_a_thread_waits_while_it_declares_so():
    own = threading.get_ident()
    assert not is_waiting(own)
    with waiting():
        with waiting():
            pass
        assert is_waiting(own) and not is_waiting(own + 1)
        with pytest.raises(ValueError), waiting():
            raise ValueError
        assert is_waiting(own)
    assert not is_waiting(own)


class Quiet:
    """In place of a lifeline: says nothing, until it is given a verdict."""

    def __init__(self, *arguments):
        self.text, self.decided, self.wakeup_fd = None, threading.Event(), -1
        self.failed = []

    def start(self):
        pass

    def close(self):
        pass

    def close_in_child(self):
        pass

    def fail(self, text, comm=False, wait=True):
        self.failed.append((text, comm))

    def decide(self, text):
        self.text = text
        self.decided.set()


@pytest.fixture
def watch(monkeypatch, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(watching, "Lifeline", Quiet)
    monkeypatch.setattr(watching.signal, "set_wakeup_fd", lambda fd, **options: -1)
    yield watching.Watch(10.0, Position())
    dist.destroy_process_group()


def test_where_a_batch_waits(watch):
    """Sections of all ranks wait; in a batch only what declares it does, wherever its code is."""
    assert not watch._report()["waiting"]
    with watch.section("save_checkpoint"):
        assert watch._report()["waiting"] and not watch._report()["late"]
    with watch.section("train_batch"):
        assert not watch._report()["waiting"]
        watch.position.plan, watch.position.op = object(), Op(F, 0, 0)
        assert not watch._report()["waiting"]
        with waiting():
            assert watch._report()["waiting"]
        assert not watch._report()["waiting"]
        watch.position.op = None  # its program is over
        assert watch._report()["waiting"]


def test_a_host_that_stands_before_a_full_queue_waits(watch):
    """Nothing is declared where a launch blocks: the device is asked, once the rank has stood still for long."""
    done = [False]
    watch.position.device_done = lambda: done[0]
    with watch.section("train_batch"):
        watch.position.plan, watch.position.op = object(), Op(F, 0, 0)
        assert not watch._report()["waiting"], "it may be computing"
        watch._seen = (watch._seen[0], time.monotonic() - watch._patience - 0.1)
        report = watch._report()
        assert report["waiting"] and report["late"]
        done[0] = True
        report = watch._report()
        assert not report["waiting"] and not report["late"], "it sleeps itself"

        def broken():
            raise RuntimeError("device-side assert")

        watch.position.device_done = broken
        assert not watch._report()["waiting"]


def test_no_loss_comes_out_of_a_batch_whose_job_was_aborted(watch):
    class Engine:
        def __init__(self):
            self.watch = watch

        @watched
        def train_batch(self):
            watch._lifeline.decide("rank 3 is lost")
            return 1.25

    with pytest.raises(PipelineRuntimeError, match="rank 3 is lost"):
        Engine().train_batch()


def test_an_error_that_garbage_causes_is_explained(watch):
    """After an abort indices, shapes and values are anything."""
    with pytest.raises(PipelineRuntimeError, match="rank 3 is lost") as caught, watch.section("train_batch"):
        watch._aborted = True
        watch._lifeline.decide("rank 3 is lost")
        raise IndexError("index 1073741824 is out of bounds")
    assert isinstance(caught.value.__cause__, IndexError)
    assert not watch._lifeline.failed


def test_an_error_of_nccl_is_one_of_communication(watch):
    with pytest.raises(dist.DistBackendError), watch.section("train_batch"):
        threading.Timer(0.01, watch._lifeline.decided.set).start()
        raise dist.DistBackendError("NCCL error: remote process exited")
    assert watch._lifeline.failed[0][1] is True


def failing(message="Connection closed by peer"):
    raise RuntimeError(message)


def waits():
    with waiting():
        failing()


def waits_and_tells():
    try:
        waits()
    except RuntimeError as error:
        raise PipelineRuntimeError("pipeline rank 0, op 0F0") from error


def steps():
    with waiting(alone=False):
        failing("the optimizer's own")


def interrupted():
    with waiting():
        raise KeyboardInterrupt


def collective_of_torch():
    dist.all_reduce(torch.zeros(2, dtype=torch.float8_e4m3fn))  # which gloo does not know


@pytest.mark.parametrize(
    ("run", "error", "of_transfer"),
    [
        (waits, RuntimeError, True),
        (waits_and_tells, PipelineRuntimeError, True),
        (collective_of_torch, RuntimeError, True),
        (failing, RuntimeError, False),
        (steps, RuntimeError, False),
        (interrupted, KeyboardInterrupt, False),
    ],
)
def test_an_error_of_a_transfer_is_told_by_its_declared_wait(watch, run, error, of_transfer):
    """Wherever the code is that waits; and no other error."""
    watch._lifeline.decided.set()
    with pytest.raises(error), watch.section("train_batch"):
        run()
    assert [comm for _, comm in watch._lifeline.failed] == [of_transfer]


def test_the_deadline_holds_though_abort_and_output_hang(watch, monkeypatch):
    """An abort waits for a device that hangs, and stderr may be a pipe that nobody reads."""
    ended, forever = threading.Event(), threading.Event()
    monkeypatch.setattr(watching, "abort_groups", forever.wait)
    monkeypatch.setattr(watching, "print", lambda *args, **options: forever.wait(), raising=False)
    monkeypatch.setattr(watching, "_PRINT_S", 0.05)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    watch._grace = 0.1
    with pytest.raises(PipelineRuntimeError), watch.section("train_batch"):
        watch._told("rank 3 is lost")
        assert ended.wait(10)
        watch._lifeline.decide("rank 3 is lost")
    forever.set()


def stepped_after(where):
    """Two ranks; the job is aborted within the step, silently, as over NCCL. What has happened by then."""
    import dualpipe_engine

    engine, *_ = dualpipe_engine.initialize(
        model=training.make_module(2, 2), config=training.settings(2, schedule="dualpipe")
    )
    data = training.stream(0)
    for _ in range(3):  # the warm-up of the learning rate begins at zero
        engine.train_batch(data)
    before = training.weights(engine)
    target = engine._tail.reduction if where == "reduction" else engine.totals
    finish = target.finish

    def finish_aborted():
        found = finish()
        engine.watch._told = lambda text: None
        engine.watch._lifeline.text = "rank 7 is lost"
        engine.watch._lifeline.decided.set()
        return found

    target.finish = finish_aborted
    try:
        engine.train_batch(data)
        text = "returned"
    except PipelineRuntimeError as error:
        text = str(error)
    after = training.weights(engine)
    engine.watch.close()
    return text, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("where", ["reduction", "loss"])
def test_no_rank_steps_or_returns_a_loss_after_an_abort(ranks, where):
    for text, same in ranks.run(2, stepped_after, where=where):
        assert "rank 7 is lost" in text
        assert same


def waits_declared():
    """What the places that wait declare, seen from within the transfers of a batch."""
    import dualpipe_engine

    engine, *_ = dualpipe_engine.initialize(
        model=training.make_module(2, 2), config=training.settings(2, schedule="dualpipe", p2p_timeout_s=30)
    )
    main, seen = threading.get_ident(), {}
    position = engine.watch.position

    def spied(owner, name, label):
        plain = getattr(owner, name)

        def run(*args, **kwargs):
            seen.setdefault(label, []).append(position.awaits is not None or is_waiting(main) or position.op is None)
            return plain(*args, **kwargs)

        setattr(owner, name, run)

    spied(engine._edges, "flush", "flush")
    spied(engine._tail.reduction, "finish", "reductions")
    spied(engine, "_exec_optimizer_step", "step")
    spied(engine.totals, "finish", "loss")
    forward = engine._executor._handlers["F"]

    def computing(op):
        forward(op)
        seen.setdefault("computing", []).append(position.awaits is not None or is_waiting(main))

    engine._executor._handlers["F"] = computing
    engine.train_batch(training.stream(0))
    return seen


def test_the_places_that_wait_declare_it(ranks):
    for seen in ranks.run(2, waits_declared):
        assert set(seen) == {"flush", "reductions", "step", "loss", "computing"}
        assert not any(seen.pop("computing"))
        assert all(all(found) for found in seen.values()), seen
