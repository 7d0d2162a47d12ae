"""Writer: takes what DeepSpeed saves of one checkpoint, and writes it at once or in a thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import logger

from ...comm.nest import Nest
from ..given import CheckpointEngine
from .files import classes_in, sync
from .snapshot import snapshot
from .sums import FileSum, SummedFile, file_sum, write_part


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
        self._held: dict[Path, Callable[[], object]] = {}  # and what writes it
        self._sums: dict[Path, FileSum] = {}  # of the files that are there
        self.error: str | None = None

    def __getattr__(self, name: str) -> object:
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
        self._held[Path(path)] = partial(self._save, snapshot(state_dict), path)

    def _save(self, state_dict: Nest, path: str) -> None:
        if isinstance(self._serializer, TorchCheckpointEngine):  # torch.save takes a file, too
            self._put(Path(path), partial(self._serializer.save, state_dict))
        else:
            self._serializer.save(state_dict, path)
            self._sums[Path(path)] = file_sum(Path(path))

    def write(self, path: Path, data: bytes) -> None:
        """Write a small file of another kind."""
        self._held[path] = partial(self._put, path, lambda file: file.write(data))

    def _put(self, path: Path, write: Callable[[SummedFile], object]) -> None:
        with SummedFile(path) as file:
            write(file)
        self._sums[path] = file.sum

    def finish(self, folder: Path, rank: int) -> None:
        """Write what is held, bring all to the disk, and list it; errors are kept.

        Args:
            folder: in which the files are.
            rank: own global rank.
        """
        while self._held:
            self.attempt(self._held.popitem()[1])
        for path in self._sums:
            self.attempt(sync, path)
            if path.name.startswith(("layer_", "dualpipe_layer_", "dualpipe_loss")):
                self.attempt(_look_at, path)
        self.attempt(write_part, folder, rank, {path.name: each for path, each in self._sums.items()})


def _look_at(path: Path) -> None:
    if names := classes_in(path):
        logger.warning(
            f"{path.name} holds objects of {', '.join(names)}, as get_extra_state of a layer returns them, and will be "
            "read as tensors and plain data: let it return such, or call torch.serialization.add_safe_globals([...]) "
            "with these before load_checkpoint"
        )
