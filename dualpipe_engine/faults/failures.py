"""Failures: a batch that fails on one rank fails on all, and the job goes on.

    rank 2 fails           rank 0                       every rank
      | failed(batch) -----> | failed(batch) -------------> | knows
      |                      | <------------ heard(batch) - |
      | <------- settled --- | settled(batch) ------------> | may send what is no result

Once it is settled all ranks know that the batch is lost, so that nothing is computed from what is sent in place of
results, and no rank steps. Two that fail in one batch are told of the one that rank 0 has heard of first.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .. import errors

TEXT_CHARACTERS = 20_000  #: of an error, at most
_POLL_S = 0.05


@dataclass(frozen=True)
class Failure:
    """What has failed.

    Args:
        batch: its number.
        rank: global rank.
        where: in which op of which pipeline rank.
        kind: type of the error.
        text: what it says.
        trace: its traceback.
    """

    batch: int
    rank: int
    where: str
    kind: str
    text: str
    trace: str

    def error(self) -> Exception:
        """What a rank raises on which it has not happened: of the same type where that is StopIteration or ours."""
        text = f"rank {self.rank} failed in {self.where}: {self.kind}: {self.text}"
        if self.kind == StopIteration.__name__:
            text = f"the data ended on rank {self.rank} in {self.where}"
        text += f". No rank has made a step of this batch, and all can go on with another one\nIts error:\n{self.trace}"
        if self.kind == StopIteration.__name__:
            return StopIteration(text)
        known = getattr(errors, self.kind, None)
        if isinstance(known, type) and issubclass(known, errors.DualPipeError):
            return known(text)
        return errors.PipelineRuntimeError(text)


class Failures:
    """Those of one rank's batches. Batches are counted alike on all ranks.

    Args:
        rank: global rank.
        world: number of ranks.
        send: sends a message to a rank; any thread may call it.

    Attributes:
        found: by number, the failures of batches that are not over here.
    """

    def __init__(self, rank: int, world: int, send: Callable[[int, dict[str, Any]], None]) -> None:
        self._rank, self._send = rank, send
        self._others = set(range(world)) - {rank}
        self._lock = threading.Lock()
        self._batch = 0
        self.found: dict[int, Failure] = {}
        self._heard: dict[int, set[int]] = {}  # batch -> ranks, on rank 0
        self._settled: set[int] = set()
        self._own: tuple[Exception, str] | None = None

    # -- in the thread that runs the program ---------------------------------------------------------------------

    def begin(self) -> None:
        """A batch begins."""
        self._batch += 1
        self._own = None

    def end(self) -> None:
        """It is over, on all ranks."""
        with self._lock:
            self.found.pop(self._batch, None)
            self._heard.pop(self._batch, None)
            self._settled.discard(self._batch)

    @property
    def known(self) -> bool:
        """Whether the batch has failed somewhere."""
        return self._batch in self.found

    def tell(self, error: Exception, where: str) -> None:
        """The batch fails here."""
        self._own = self._own or (error, where)
        trace = "".join(traceback.format_exception(error))[-TEXT_CHARACTERS:]
        text = str(error)[:TEXT_CHARACTERS]
        failure = Failure(self._batch, self._rank, where, type(error).__name__, text, trace)
        if self._rank == 0:
            self._relay(failure)
        else:
            self._send(0, {"failed": asdict(failure)})

    def settle(self, patience_s: float, lost: Callable[[], bool]) -> bool:
        """Wait until all ranks know.

        Args:
            patience_s: seconds to wait.
            lost: whether a rank is lost, so that it cannot be.

        Returns:
            Whether they do.
        """
        until = time.monotonic() + patience_s
        while self._batch not in self._settled:
            if lost() or time.monotonic() > until:
                return False
            time.sleep(_POLL_S / 10)
        return True

    def error(self) -> Exception | None:
        """What this rank is to raise, an error that all ranks raise; None: the batch has not failed."""
        failure = self.found.get(self._batch)
        if failure is None:
            return None
        error: Exception = failure.error()
        if self._own is not None:
            error, where = self._own
            if isinstance(error, errors.DualPipeError):
                error = type(error)(f"{where}: {error}").with_traceback(error.__traceback__)
        vars(error)["everywhere"] = True
        return error

    # -- in the thread of the lifeline ---------------------------------------------------------------------------

    def open(self) -> Failure | None:
        """The failure of a batch that is not over on this rank."""
        return next(iter(self.found.values()), None)

    def obey(self, source: int, message: dict[str, Any]) -> None:
        """A message of another rank."""
        if "failed" in message:
            failure = Failure(**message["failed"])
            if self._rank == 0:
                self._relay(failure)
            else:
                self.found[failure.batch] = failure
                self._send(0, {"heard": failure.batch})
        elif "heard" in message:
            self._hear(message["heard"], source)
        elif "settled" in message:
            self._settled.add(message["settled"])

    def _relay(self, failure: Failure) -> None:
        """On rank 0: the first one of a batch counts."""
        with self._lock:
            if failure.batch in self.found:
                return
            self.found[failure.batch] = failure
            self._heard[failure.batch] = set()
        for rank in self._others:
            self._send(rank, {"failed": asdict(failure)})
        self._hear(failure.batch, 0)

    def _hear(self, batch: int, rank: int) -> None:
        with self._lock:
            heard = self._heard.setdefault(batch, set())
            heard.add(rank)
            if not heard >= self._others | {0}:
                return
        for each in self._others:
            self._send(each, {"settled": batch})
        self._settled.add(batch)
