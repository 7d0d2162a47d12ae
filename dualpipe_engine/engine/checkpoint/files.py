"""Files of checkpoints: written aside and renamed when complete, looked at before they are loaded."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch

from ...errors import CheckpointError

PARTIAL = ".partial"  #: ending of a folder that is being written
DESCRIPTION = "dualpipe.json"  #: in the folder of a checkpoint: the layers, for `dualpipe export`
REPLACED = ".replaced"  #: ending of a folder whose successor is being put in its place


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


def settle(folder: Path) -> None:
    """Undo what a run that was killed while it saved `folder` has left behind."""
    shutil.rmtree(f"{folder}{PARTIAL}", ignore_errors=True)
    replaced = Path(f"{folder}{REPLACED}")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        replaced.rename(folder)


def publish(folder: Path) -> None:
    """Give the complete folder `folder`.partial its name, in place of an older one, whose files that belong to no
    checkpoint move along. A run that is killed in between leaves the older one to `settle`."""
    replaced = Path(f"{folder}{REPLACED}")
    if folder.exists():
        folder.rename(replaced)
    Path(f"{folder}{PARTIAL}").rename(folder)
    for path in replaced.iterdir() if replaced.exists() else ():
        if not (path.name.endswith("_states.pt") or path.name.startswith("dualpipe") or (folder / path.name).exists()):
            path.rename(folder / path.name)
    shutil.rmtree(replaced, ignore_errors=True)


def standing(folder: Path) -> Path:
    """Where the checkpoint `folder` is: a run that was killed in `publish` has left it under another name."""
    replaced = Path(f"{folder}{REPLACED}")
    return replaced if replaced.exists() and not folder.exists() else folder


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new text, never a part."""
    aside = Path(f"{path}{PARTIAL}")
    aside.write_text(text)
    os.replace(aside, path)


def damage(path: Path) -> str | None:
    """What is wrong with a file of `torch.save`, as far as its size and its table of contents show; None if nothing."""
    if not path.is_file():
        return f"{path} is missing"
    with path.open("rb") as file:
        start = file.read(2)
    if not start or (start == b"PK" and not zipfile.is_zipfile(path)):
        return f"{path} is cut off ({path.stat().st_size} bytes)"
    return None


def damages(paths: Iterable[Path]) -> list[str]:
    """What is wrong with files of `torch.save`."""
    return [found for found in map(damage, paths) if found]


def peek(path: Path) -> Any:
    """Load a file without reading its tensors before they are used.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if found := damage(path):
        raise CheckpointError(found)
    with naming(path):
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=False)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let errors of reading `path` say so.

    Raises:
        CheckpointError: the body failed.
    """
    try:
        yield
    except Exception as error:  # unpickling may raise anything
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


@contextmanager
def naming_reads(reader: Any) -> Iterator[None]:
    """Let every `reader.load(path, ...)` within the body name the file that it fails on.

    Raises:
        CheckpointError: a file cannot be read.
    """
    load = reader.load

    def named(path: str, *args: Any, **kwargs: Any) -> Any:
        with naming(path):
            return load(path, *args, **kwargs)

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
