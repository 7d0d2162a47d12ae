"""Files of checkpoints: written aside and renamed when complete, looked at before they are loaded."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import torch
from deepspeed.utils import logger
from torch.serialization import MAP_LOCATION, get_unsafe_globals_in_checkpoint

from ...errors import CheckpointError
from ...schedule.plain_json import parse
from ..given import CheckpointEngine, SavedState

PARTIAL = ".partial"  #: ending of a folder that is being written
DESCRIPTION = "dualpipe.json"  #: in the folder of a checkpoint: the layers, for `dualpipe export`
LATEST = ("latest", "latest_universal")  #: files beside the folders of checkpoints: the tag of one of them
REPLACED = ".replaced"  #: ending of a folder whose successor is being put in its place
_JOB = re.compile(r"[0-9a-f]{8}")


def new_job() -> str:
    """A name that tells a job from others that save into the same folder."""
    return secrets.token_hex(4)


def checked_tag(tag: str, source: str = "tag") -> str:
    """A tag that all ranks have, looked at: it must name a folder below that of the checkpoints.

    Args:
        tag: the tag.
        source: where it comes from, for errors.

    Raises:
        CheckpointError: it names no such folder.
    """
    path = PurePath(tag)
    if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != tag or not tag.isprintable():
        text = f"{source} {tag!r} is no name of a folder below that of the checkpoints: take one such as global_step1"
        raise CheckpointError(text, everywhere=True)
    if path.suffix in (PARTIAL, REPLACED):
        text = f"{source} {tag!r} ends in {path.suffix}, as folders that are being written do: take another"
        raise CheckpointError(text, everywhere=True)
    return tag


def check_free(folder: Path) -> None:
    """A checkpoint takes no name that a file beside the folders of checkpoints has.

    Raises:
        CheckpointError: it would.
    """
    if folder.name in LATEST or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is the name of a file, not of a checkpoint: take another")


def unfinished(folder: Path, job: str) -> Path:
    """Where a job writes the checkpoint `folder` before it takes its name; no other job writes there."""
    return Path(f"{folder}.{job}{PARTIAL}")


def settle(parent: Path, elsewhere: str | None) -> None:
    """Undo what runs that were killed while they saved into `parent` have left behind.

    Args:
        parent: of the folders of checkpoints.
        elsewhere: a job whose unfinished folders stay, as it may be running.
    """
    for path, name, job in _leftovers(parent):
        if job == elsewhere:
            logger.warning(f"{path} is left by a job on another machine: remove it if that has ended")
        elif path.suffix == REPLACED and not (parent / name).exists():
            path.rename(parent / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def publish(folder: Path, job: str) -> None:
    """Give the complete folder of `unfinished` its name, in place of an older one, whose files that belong to no
    checkpoint move along. A run that is killed in between leaves the older one to `settle`."""
    done, replaced = unfinished(folder, job), Path(f"{folder}.{job}{REPLACED}")
    sync(done)
    if folder.exists():
        folder.rename(replaced)
    done.rename(folder)
    for path in replaced.iterdir() if replaced.exists() else ():
        if not (path.name.endswith("_states.pt") or path.name.startswith("dualpipe") or (folder / path.name).exists()):
            path.rename(folder / path.name)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def standing(folder: Path) -> Path:
    """Where the checkpoint `folder` is: a run that was killed in `publish` has left it under another name."""
    if folder.exists():
        return folder
    return next((path for path, name, _ in _leftovers(folder.parent, REPLACED) if name == folder.name), folder)


def saved_by(folder: Path) -> tuple[str | None, float]:
    """The job that has saved a checkpoint, and when, in seconds as in `os.stat`; (None, 0.0) where nothing tells."""
    try:
        path = folder / DESCRIPTION
        return parse(path.read_text()).get("job"), path.stat().st_mtime
    except (OSError, ValueError, AttributeError):
        return None, 0.0


def _leftovers(parent: Path, *endings: str) -> Iterator[tuple[Path, str, str]]:
    """Folders that jobs have left in `parent`: path, name of the checkpoint, job."""
    for path in sorted(parent.glob("*")):
        name, _, job = path.stem.rpartition(".")
        if path.suffix in (endings or (PARTIAL, REPLACED)) and name and _JOB.fullmatch(job):
            yield path, name, job


def sync(path: Path) -> None:
    """Bring a file or a folder to the disk.

    Raises:
        OSError: it cannot be written, as when the disk is full.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new text, never a part."""
    aside = Path(f"{path}{PARTIAL}")
    aside.write_text(text)
    sync(aside)
    os.replace(aside, path)


def damage(path: Path) -> str | None:
    """What is wrong with a file of `torch.save`, as far as its size and its table of contents show; None if nothing."""
    if not path.is_file():
        return f"{path} is missing"
    if path.suffix != ".pt":
        return None
    with path.open("rb") as file:
        start = file.read(2)
    if not start or (start == b"PK" and not zipfile.is_zipfile(path)):
        return f"{path} is cut off ({path.stat().st_size} bytes)"
    return None


def damages(paths: Iterable[Path]) -> list[str]:
    """What is wrong with files of `torch.save`."""
    return [found for found in map(damage, paths) if found]


def peek(path: Path, weights_only: bool = False) -> SavedState:
    """Load a file without reading its tensors before they are used.

    Args:
        path: of a file of `torch.save`.
        weights_only: as of `torch.load`: unpickle nothing but tensors and plain containers.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if found := damage(path):
        raise CheckpointError(found)
    with naming(path):
        if weights_only:
            _refuse_classes(path)
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=weights_only)


def classes_in(path: str | Path) -> list[str]:
    """Classes of objects in a file of `torch.save` that are read neither as weights nor as plain data, as
    `get_extra_state` of a layer may return them."""
    return sorted(get_unsafe_globals_in_checkpoint(str(path))) if zipfile.is_zipfile(path) else []


def _refuse_classes(path: str | Path) -> None:
    if names := classes_in(path):
        raise CheckpointError(
            f"{path} holds objects of {', '.join(names)}, as get_extra_state of a layer returns them, and is read as "
            "tensors and plain data: if you trust it, call torch.serialization.add_safe_globals([...]) with these "
            "before, on every rank"
        )


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let errors of reading `path` say so.

    Raises:
        CheckpointError: the body failed.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # unpickling may raise anything
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


@contextmanager
def reading(reader: CheckpointEngine, fitted: Callable[[SavedState], SavedState]) -> Iterator[None]:
    """Let every `reader.load(path, ...)` within the body name the file that it fails on; those of layers hold weights,
    and nothing else of them is unpickled.

    Args:
        reader: DeepSpeed's checkpoint engine.
        fitted: makes of what another file holds what `load` returns.

    Raises:
        CheckpointError: a file cannot be read.
    """
    load = reader.load

    def named(path: str, map_location: MAP_LOCATION = None) -> SavedState:
        with naming(path):
            if PurePath(path).name.startswith(("layer_", "dualpipe_")):
                _refuse_classes(path)
                return torch.load(path, map_location, weights_only=True)
            return fitted(load(path, map_location))

    reader.load = named
    try:
        yield
    finally:
        reader.load = load


def other_tags(folder: Path) -> list[str]:
    """Checkpoints beside `folder`, oldest first."""
    found = [
        path.parent
        for path in folder.parent.glob("*/mp_rank_00_model_states.pt")
        if path.parent != folder and path.parent.suffix not in (PARTIAL, REPLACED)
    ]
    return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime)]
