"""The engine's part of a checkpoint: a folder beside Lightning's file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from dualpipe_engine.errors import CheckpointError

from ..elsewhere import load_from

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine

ENDING = ".engine"  #: of the folder, after the name of the file


def engine_folder(file: Path) -> Path:
    """The folder that belongs to a file."""
    return file.with_name(file.name + ENDING)


def save_engine(engine: DualPipeEngine, file: Path) -> None:
    """Save what the file does not hold: optimizer, masters, random states. Collective over all ranks."""
    engine.save_checkpoint(str(file.parent), tag=engine_folder(file).name, save_latest=False)


def remove_engine(file: Path) -> None:
    """Remove the folder of a file, if it has one."""
    shutil.rmtree(engine_folder(file), ignore_errors=True)


def load_engine(engine: DualPipeEngine, file: Path, elsewhere: bool) -> None:
    """Load the folder of a file; see `load_from`. Collective over all ranks.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    there = [engine_folder(file).is_dir()]
    dist.broadcast_object_list(there)
    if not there[0]:
        raise CheckpointError(
            f"{engine_folder(file)} is not there, which holds the optimizer's state of {file.name}: copy it too, or "
            "train from the weights alone by load_from_checkpoint"
        )
    load_from(engine, engine_folder(file), elsewhere, "DualPipeStrategy(resume_elsewhere=True)")
