"""The engine's part of a checkpoint: a folder beside Lightning's file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from dualpipe_engine.comm.from_all import from_all
from dualpipe_engine.errors import CheckpointError

from ..elsewhere import load_from
from ..random_streams import host_state, set_host_state

if TYPE_CHECKING:
    from .pipeline import Pipeline

ENDING = ".engine"  #: of the folder, after the name of the file
BATCHES = "random states of batches"  #: of all ranks, in the engine's part


def engine_folder(file: Path) -> Path:
    """The folder that belongs to a file."""
    return file.with_name(file.name + ENDING)


def save_engine(pipeline: Pipeline, file: Path) -> None:
    """Save what the file does not hold: optimizer, masters, random states. Collective over all ranks."""
    state = {BATCHES: from_all(host_state())}
    with pipeline.randomness():
        pipeline.made.save_checkpoint(str(file.parent), engine_folder(file).name, state, save_latest=False)


def remove_engine(file: Path) -> None:
    """Remove the folder of a file, if it has one."""
    shutil.rmtree(engine_folder(file), ignore_errors=True)


def load_engine(pipeline: Pipeline, file: Path, elsewhere: bool) -> None:
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
    with pipeline.randomness():
        state = load_from(pipeline.made, engine_folder(file), elsewhere, "DualPipeStrategy(resume_elsewhere=True)")
    drawn = state.get(BATCHES, ())
    if len(drawn) == dist.get_world_size():
        set_host_state(drawn[dist.get_rank()])
