"""Writer: takes what DeepSpeed saves of one checkpoint, and writes it at once or in a thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...comm.nest import Nest
from ..given import CheckpointEngine
from .files import sync
from .snapshot import snapshot
from .sums import Sums, file_sum, write_part


class Writer:
    """Stands in for DeepSpeed's checkpoint engine while a checkpoint is saved.

    An error is kept, and nothing more is written: all ranks come to the end of the save, where they tell each other,
    and the save is all that it costs.

    Args:
        serializer: DeepSpeed's checkpoint engine, which serializes.
        background: hold a copy of what is saved until `finish` writes it.

    Attributes:
        error: the first one; None as long as all goes well.
    """

    def __init__(self, serializer: CheckpointEngine, background: bool = False) -> None:
        self._serializer, self._background = serializer, background
        self._files: dict[Path, Callable[[], Any] | None] = {}  # and what writes them; None: they are there
        self.error: str | None = None

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._serializer, name)

    def attempt(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Call a function that writes, unless writing has failed before."""
        if self.error is None:
            try:
                function(*args, **kwargs)
            except Exception as error:  # pickling may raise anything
                self.error = f"{type(error).__name__}: {error}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(self._serializer.makedirs, path, exist_ok=exist_ok)

    def save(self, state_dict: object, path: str) -> None:
        """Write a file, or hold a copy of it, after which the state may change."""
        self.attempt(self._hold if self._background else self._save, state_dict, path)

    def _hold(self, state_dict: Nest, path: str) -> None:
        self._files[Path(path)] = partial(self._serializer.save, snapshot(state_dict), path)

    def _save(self, state_dict: Nest, path: str) -> None:
        self._files[Path(path)] = None
        self._serializer.save(state_dict, path)

    def write(self, path: Path, data: bytes) -> None:
        """Write a small file of another kind."""
        self._files[path] = partial(path.write_bytes, data)

    def finish(self, folder: Path, rank: int) -> None:
        """Write what is held, bring all to the disk, and list it; errors are kept.

        Args:
            folder: in which the files are.
            rank: own global rank.
        """
        sums: Sums = {}
        while self._files:
            self.attempt(self._settle, *self._files.popitem(), sums)
        self.attempt(write_part, folder, rank, sums)

    @staticmethod
    def _settle(path: Path, write: Callable[[], Any] | None, sums: Sums) -> None:
        if write is not None:
            write()
        sync(path)
        sums[path.name] = file_sum(path)
