"""A checkpoint of an engine, loaded on the ranks and by the schedule that have saved it, or on others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dualpipe_engine.engine.checkpoint.convert import convert
from dualpipe_engine.errors import CheckpointError, OtherRanksError

if TYPE_CHECKING:
    from dualpipe_engine.engine.engine import DualPipeEngine

CONVERTED = ".universal"  #: ending of the folder beside a checkpoint's, while other ranks load it


def load_from(engine: DualPipeEngine, folder: Path, elsewhere: bool, argument: str) -> dict[str, Any]:
    """Load weights, optimizer and random states. Collective over all ranks.

    Args:
        engine: whose they become.
        folder: of the checkpoint, a tag.
        elsewhere: whether other ranks, or another schedule, may have saved it; then it is converted for the time of
            loading, which takes as much room on the disk again.
        argument: how the user says so.

    Returns:
        The `client_state`, empty where others have saved it.

    Raises:
        CheckpointError: it is not there, not whole, or of others and `elsewhere` is false.
    """
    try:
        path, state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except OtherRanksError:
        if not elsewhere:
            raise OtherRanksError(
                f"{folder} was saved by another schedule or other ranks: pass {argument}, which loads optimizer states "
                "of ZeRO-1 and ZeRO-2 here too",
                everywhere=True,
            ) from None
        _load_converted(engine, folder)
        return {}
    if path is None:
        raise CheckpointError(f"{folder} holds no state of an engine")
    return state or {}


def load_weights(engine: DualPipeEngine, folder: Path) -> None:
    """Load weights alone, whoever has saved them. Collective over all ranks.

    Raises:
        CheckpointError: they are not there.
    """
    path, _ = engine.load_checkpoint(
        str(folder.parent),
        tag=folder.name,
        load_module_only=True,
        load_optimizer_states=False,
        load_lr_scheduler_states=False,
    )
    if path is None:
        raise CheckpointError(f"{folder} holds no state of an engine")


def _load_converted(engine: DualPipeEngine, folder: Path) -> None:
    target = folder.with_name(folder.name + CONVERTED)
    box: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            shutil.rmtree(target, ignore_errors=True)
            convert(folder, target)
        except CheckpointError as error:
            box[0] = str(error)
    dist.broadcast_object_list(box)
    if box[0] is not None:
        raise CheckpointError(box[0])
    before = engine._config.load_universal_checkpoint
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(target.parent), tag=target.name)
    finally:
        engine._config.load_universal_checkpoint = before
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
            (target.parent / "latest_universal").unlink(missing_ok=True)
