"""SaveOnSignal: the signal that announces the end of a job, as a cluster's SIGTERM does, is not its end yet."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ...errors import ConfigError


class SaveOnSignal:
    """Notes a signal until the batch is over, when all ranks learn of it, save and end together.

    A handler that was there before is called as well. The signal's exit code is the shell's, 128 + its number: 143 for
    SIGTERM.

    Args:
        name: of the signal, such as "SIGTERM".

    Attributes:
        came: whether this rank was sent it.

    Raises:
        ConfigError: this is not the main thread, where Python handles signals.
    """

    def __init__(self, name: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(f'"save_on_signal": "{name}" works in the main thread only: call initialize there')
        self.number = signal.Signals[name]
        self.came = False
        self._before: Any = signal.signal(self.number, self._note)

    def leave(self) -> SystemExit:
        """What to raise when the checkpoint is saved; all ranks do."""
        ended = SystemExit(128 + self.number)
        vars(ended)["everywhere"] = True
        return ended

    def close(self) -> None:
        """Give the signal back."""
        if signal.getsignal(self.number) == self._note:
            signal.signal(self.number, self._before if self._before is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if callable(self._before):
            self._before(number, frame)
