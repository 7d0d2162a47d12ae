"""Files that are whole or not there: written beside their place, and renamed when complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yield the name under which the body writes the file; afterwards `path` is that file.

    Where the body fails, as on a full disk, `path` is what it was. What is there and no plain file (a pipe, a terminal)
    is written as it is.

    Raises:
        OSError: the file cannot take its name.
        ValueError: no file can have the name.
    """
    target = Path(os.path.realpath(path))  # a link stays one
    if target.exists() and not target.is_file():
        yield target
        return
    part = target.with_name(f".dualpipe.{uuid4().hex}.part")  # ranks of several machines may have one pid
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file (UTF-8), of which a reader sees the old one or the whole new one.

    Raises:
        OSError: it cannot be written.
        ValueError: no file can have the name.
    """
    with written_aside(path) as part:
        part.write_text(text, encoding="utf-8")
