"""Watch: no rank waits for one that is lost. The errors that say who is, and the way out of a wait that cannot end."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import ConfigError, OutputError, PipelineRuntimeError, PlanError
from ..schedule.progress import Position, is_waiting, of_transfer, waiting
from .abort import abort_groups
from .alike import Alike
from .lifeline import FAILED, GONE, LATE, LEFT, SETTLE_S, SILENT, Lifeline, Message

_COLLECTIVES = ("torch.distributed.", "deepspeed.comm.")  #: modules of others whose functions are all collectives
_BATCHES = "train_batch", "eval_batch"  #: sections in which a rank may fall behind; all others wait from end to end
_PRINT_S = 1.0  #: seconds that a full pipe may hold a message of a rank that is about to end
_SHOWN = 8  #: ranks that a message lists
_WHY = {
    GONE: "its process ended without a word (killed or crashed)",
    SILENT: "its process is stopped, or its machine cannot be reached",
    LATE: "it has fallen behind: no progress while others wait for it",
    LEFT: "it ended its program",
    FAILED: "it failed",
}


class Watch:
    """Watches over the ranks of a job while they run sections of the engine.

    A rank that is lost makes every other rank raise a `PipelineRuntimeError` at its wait; one that cannot leave its
    section ends its process with the same message and exit code 1.

    Args:
        timeout_s: `p2p_timeout_s`; ranks end within it.
        position: where the program is.

    Attributes:
        recovers: whether a batch that fails on one rank can be brought to its end on all of them. The same on all.
    """

    recovers = False

    def __init__(self, timeout_s: float, position: Position) -> None:
        self.position = position
        self._timeout = timeout_s
        self._patience = max(0.6 * timeout_s, timeout_s - 10)
        self._grace = min(3.0, 0.2 * timeout_s)
        self._section: str | None = None
        self._broken = False  # a transfer has failed, and this rank waits to be told why
        self._aborted = False  # transfers may have ended without their data, and without an error
        self._depth = self._batches = 0
        self._seen: tuple[Any, float] = (None, 0.0)
        self._before = -1  # the program's own wake-up file
        self._main = threading.get_ident()
        self._world = dist.group.WORLD
        self._alike = Alike(_share)
        self._lifeline = line = Lifeline(
            dist.get_rank(),
            dist.get_world_size(),
            _share,
            self._patience,
            self._report,
            describe,
            self._told,
            self._signalled,
        )
        line.start()
        self._at_exit = Finalize(None, self._leave, exitpriority=10)
        _LIFELINES.add(line)

    def section(self, name: str) -> _Section:
        """Context of a part of the program that waits for other ranks.

        Raises:
            PipelineRuntimeError: a rank is lost, at the start or within.
        """
        return _Section(self, name)

    def check(self) -> None:
        """After waits, before anything is made of what they brought: NCCL ends the transfers of a group that is aborted
        as if they were done.

        Raises:
            PipelineRuntimeError: the groups were aborted, or are about to be.
        """
        if self._aborted or self._lifeline.text is not None:
            self._lifeline.decided.wait(SETTLE_S + 1)
            raise PipelineRuntimeError(self._lifeline.text or "the batch was interrupted")

    def begin_batch(self) -> None:
        """A batch begins, on all ranks."""
        self._lifeline.failures.begin()

    def end_batch(self) -> None:
        """It has ended or failed, on all ranks."""
        self._lifeline.failures.end()

    @property
    def batch_failed(self) -> bool:
        """Whether the batch has failed on a rank, so that nothing is to be made of what comes from others."""
        return self._lifeline.failures.known

    @property
    def failures(self) -> Mapping[int, object]:
        """Failures of batches that are not over; a live view, empty as long as all goes well."""
        return self._lifeline.failures.found

    def fail_batch(self, error: Exception | None, where: str = "") -> None:
        """The batch fails on this rank; return when all ranks know, and are about to bring it to its end.

        Args:
            error: why; None: another rank has told.
            where: in which op.

        Raises:
            Exception: `error`, if this ends the job: it comes from a transfer, or layers have transfers of their own.
            PipelineRuntimeError: a rank is lost.
        """
        line = self._lifeline
        if error is not None:
            if getattr(error, "everywhere", False) or not self.recovers or self._aborted or _from_comm(error):
                raise error
            line.failures.tell(error, where)
        with waiting():
            if not line.failures.settle(self._patience / 2, lambda: line.text is not None):
                raise error or PipelineRuntimeError(line.text or "not all ranks have heard that the batch has failed")

    def raise_failed(self) -> None:
        """After a collective of all ranks that comes last in a batch.

        Raises:
            Exception: the batch has failed, on all ranks: its own error on the rank that failed.
        """
        if error := self._lifeline.failures.error():
            raise error

    def close(self) -> None:
        """End the watch, as when the process group is gone or the engine is given back."""
        self._lifeline.close()
        self._at_exit.cancel()

    def _leave(self) -> None:
        """At the end of the process."""
        error = _uncaught()
        told = getattr(error, "everywhere", False) or self._lifeline.text is not None
        if error is not None and not told:
            self._lifeline.fail("".join(traceback.format_exception(error)))
        self.close()

    # -- in the thread that runs the program ---------------------------------------------------------------------

    def _enter(self, name: str) -> None:
        if self._lifeline.text is not None:
            raise PipelineRuntimeError(
                f"the engine ended when {self._lifeline.text}\nIts process groups are broken: start the job again, and "
                "load the last checkpoint"
            )
        self._depth += 1
        if self._depth == 1:
            self._section = name
            if threading.current_thread() is threading.main_thread():
                # Python handles Ctrl-C when the wait is over; the thread, which reads this, ends the wait.
                self._before = signal.set_wakeup_fd(self._lifeline.wakeup_fd, warn_on_full_buffer=False)
            self._batches += name == "train_batch"

    def _exit(self, error: BaseException | None) -> None:
        try:
            if self._depth == 1 and error is None:
                self.check()
            elif self._depth == 1 and not self._everywhere(error):
                assert error is not None
                self._explain(error)
        finally:
            self._depth -= 1
            if self._depth == 0:
                if threading.current_thread() is threading.main_thread():
                    signal.set_wakeup_fd(self._before)
                self._section = self.position.op = self.position.plan = self.position.awaits = None

    def _everywhere(self, error: BaseException | None) -> bool:
        """Whether all ranks raise an error, which batches find out by other means."""
        if (
            isinstance(error, Exception)
            and not getattr(error, "everywhere", False)
            and not (self._section in _BATCHES or self._aborted or self._lifeline.text or _from_comm(error))
        ):
            error.everywhere = self._alike.raised_by_all(error)  # type: ignore[attr-defined]
        return getattr(error, "everywhere", False)

    def _explain(self, error: BaseException) -> None:
        """Raise what is behind an error of communication, or of what an aborted one has left; tell the others of any
        other error."""
        comm = _from_comm(error)
        if comm:
            self._broken = True
            self._lifeline.decided.wait(SETTLE_S + 1)
        if self._lifeline.text is None:
            self._lifeline.fail("".join(traceback.format_exception(error)), comm=comm)
        elif comm or (self._aborted and isinstance(error, Exception) and not self._mistake(error)):
            raise PipelineRuntimeError(self._lifeline.text) from error

    def _mistake(self, error: Exception) -> bool:
        """Whether an error is of a user's making, and no consequence: the others have found it a little earlier."""
        return isinstance(error, (ConfigError, PlanError)) and self._section not in _BATCHES

    # -- in the thread of the lifeline ---------------------------------------------------------------------------

    def _report(self) -> Message:
        if self._world is not dist.group.WORLD:
            self._lifeline.close()
        section, op, plan_runs = self._section, self.position.op, self._section in _BATCHES
        declared = self._broken or self.position.awaits is not None or is_waiting(self._main)
        # When its program is over a rank shares its results with the others.
        declared = declared or (self.position.plan is not None and op is None) or not (section is None or plan_runs)
        now, here = time.monotonic(), (section, self._batches, id(op), declared)
        if here != self._seen[0]:
            self._seen = (here, now)
        age = now - self._seen[1]
        waiting = declared or (age > self._patience / 2 and self._device_waits())
        where = "outside of the engine" if section is None else section
        if section == "train_batch":
            where += f" {self._batches}"
        if op is not None:
            where += f", op {op}"
        return {
            "where": where,
            "op": None if op is None else str(op),
            "section": section,
            "waiting": waiting,
            "age": age,
            "late": plan_runs and waiting and age > self._patience,
            "awaits": self.position.awaited(),
        }

    def _device_waits(self) -> bool:
        """Whether the host stands still because the device does: the queue in front of it is full."""
        done = self.position.device_done
        try:
            return done is not None and not done()
        except RuntimeError:  # the device is broken, which the program will hear itself
            return False

    def _signalled(self, numbers: bytes) -> None:
        if self._before >= 0 and (others := numbers.replace(b"\0", b"")):
            with suppress(OSError):  # asyncio, or whoever else waits for signals, hears of them as before
                os.write(self._before, others)
        if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is signal.default_int_handler and self._section:
            self._lifeline.fail("KeyboardInterrupt", wait=False)
            self._abort()

    def _told(self, text: str) -> None:
        if self._world is not dist.group.WORLD:
            return
        threading.Thread(target=self._break_out, args=(text,), daemon=True).start()

    def _abort(self) -> None:
        self._aborted = True
        aborting = threading.Thread(target=abort_groups, daemon=True)  # it may wait for a device that hangs
        aborting.start()
        # A thread that comes out of a wait of torch's while Python ends takes the process down with SIGABRT.
        Finalize(None, aborting.join, (self._grace,), exitpriority=0)

    def _break_out(self, text: str) -> None:
        """Nothing here may last: the deadline holds for a rank whose device, output or interpreter hangs, too."""
        until = time.monotonic() + self._grace
        self._abort()
        if self._section is None:
            _say(text)
        while time.monotonic() < until:
            if self._section is None:
                return
            time.sleep(0.05)
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame else ""
        _say(f"{text}\nThis rank could not leave:\n{stack}")
        os._exit(1)


_LIFELINES: weakref.WeakSet[Lifeline] = weakref.WeakSet()


def _forget() -> None:
    """In a forked process, such as a worker of a DataLoader: numbers of files that were ours may soon be those of
    others, and what waits to be collected may be a process group, which would wait for threads that are not here."""
    gc.freeze()
    lines = list(_LIFELINES)
    for line in lines:
        line.close_in_child()
    with suppress(ValueError):  # not the main thread, which has no wake-up file
        before = signal.set_wakeup_fd(-1)
        if before not in [-1, *(line.wakeup_fd for line in lines)]:
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)


os.register_at_fork(after_in_child=_forget)


class _Section:
    def __init__(self, watch: Watch, name: str) -> None:
        self._watch, self._name = watch, name

    def __enter__(self) -> None:
        self._watch._enter(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch._exit(error)


def describe(cause: Message, reports: dict[int, Message]) -> str:
    """The sentence for people: who is lost and why, the op that it was expected to run, and who waits.

    Args:
        cause: "kind", "rank" (None: to be found), "at" (the rank's last report) and, of a failure, "text".
        reports: of the other ranks.
    """
    rank, last = cause["rank"], cause.get("at") or {}
    if rank is None:
        rank = _behind(reports)
        last = reports.pop(rank)
    waiting = {each: report for each, report in reports.items() if report["waiting"]}
    direct = [report["awaits"][1] for report in waiting.values() if report["awaits"] and report["awaits"][0] == rank]
    why = _WHY[cause["kind"]]
    if cause["kind"] == FAILED:
        expected = last.get("op") or last.get("section")
    else:
        shared = [report["op"] or report["section"] for report in waiting.values() if not report["awaits"]]
        # Its last report may be from before the section in which others wait now.
        entered = [report["section"] for report in waiting.values()]
        expected = next(iter(direct + shared), None) or last.get("op") or next(iter(entered), last.get("section"))
    text = f"rank {rank} is lost: {why}"
    text += f". It was expected to run {expected}" if expected else ""
    text += f" (last seen in {last['where']})" if last.get("where") else ""
    if waiting:
        shown = [f"rank {each} in {report['where']}{_for(report)}" for each, report in sorted(waiting.items())]
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        text += f". Waiting: {'; '.join(shown[:_SHOWN])}{more}"
    return text + (f"\nIts error:\n{cause['text']}" if cause.get("text") else "")


def _for(report: Message) -> str:
    return f" for {report['awaits'][1]} of rank {report['awaits'][0]}" if report["awaits"] else ""


def _behind(reports: dict[int, Message]) -> int:
    """Whom all wait for: the end of a chain of waits, or who has stood still longest."""
    start = max(reports, key=lambda rank: reports[rank]["age"])
    busy = [rank for rank, report in reports.items() if not report["waiting"]]
    rank, passed = start, set()
    while rank not in passed and reports[rank]["awaits"] and reports[rank]["awaits"][0] in reports:
        passed.add(rank)
        rank = reports[rank]["awaits"][0]
    if rank in busy or not busy:
        return rank
    return max(busy, key=lambda each: reports[each]["age"])


def _uncaught() -> BaseException | None:
    """The error that ends this process: of a script, of a function that multiprocessing has started, or of one that
    torch's `spawn` has, which leaves by `sys.exit`."""
    error = getattr(sys, "last_value", None) or sys.exc_info()[1]
    return error.__context__ if isinstance(error, SystemExit) else error


Value = TypeVar("Value")


def _share(value: Value) -> Value:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _say(text: str) -> None:
    """Print to stderr, unless nobody reads it."""
    message = f"dualpipe_engine: {text}"
    printing = threading.Thread(target=print, args=(message,), kwargs={"file": sys.stderr, "flush": True}, daemon=True)
    printing.start()
    printing.join(_PRINT_S)


def _from_comm(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, was raised by a transfer or a collective: by its class, by what has
    waited for it, or by a collective of torch or DeepSpeed, which declare nothing."""
    while error is not None:
        if isinstance(error, dist.DistError) or of_transfer(error):
            return True
        if isinstance(error, OutputError):
            return False
        if isinstance(error, RuntimeError) and _raised_in(error).startswith(_COLLECTIVES):
            return True
        error = error.__cause__
    return False


def _raised_in(error: BaseException) -> str:
    """The name of the module whose function raised an error, with a dot behind it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "." if trace is None else f"{trace.tb_frame.f_globals.get('__name__', '')}."
