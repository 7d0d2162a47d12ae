"""What is saved is what is loaded: the files of a checkpoint are listed with their sizes and CRC-32.

Each rank lists the files that it has written (`write_part`); rank 0 makes one list of them (`merge_parts`). Where
there is no list, as in a checkpoint of stock DeepSpeed, the CRC-32 that zip files of `torch.save` hold are looked at.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from ...errors import CheckpointError
from ...schedule.plain_json import parse
from .files import write_text

FILES = "dualpipe_files.json"  #: in the folder of a checkpoint
BLOCK_BYTES = 1 << 20
FileSum = tuple[int, int]  #: bytes, CRC-32
Sums = dict[str, FileSum]  #: by name in the folder


class SummedFile:
    """A file that is written from its beginning to its end; its sum is that of what was meant to be written.

    An error does not leave `write`, whose callers in C++ would end the process, but the context.

    Attributes:
        name: the path.
        sum: bytes and CRC-32 so far.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.sum: FileSum = 0, 0
        self._error: OSError | None = None
        self._file = path.open("wb")

    def write(self, data: bytes | memoryview) -> int:
        """Take data, in blocks that stay in the processor's cache from the sum to the file."""
        view = memoryview(data).cast("B")
        size, crc = self.sum
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            crc = zlib.crc32(block, crc)
            self._try(self._file.write, block)
        self.sum = size + len(view), crc
        return len(view)

    def flush(self) -> None:
        self._try(self._file.flush)

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._try(self._file.close)
        if self._error is not None and kind is None:
            raise self._error

    def _try(self, call: Callable[..., object], *args: object) -> None:
        if self._error is None or call == self._file.close:
            try:
                call(*args)
            except OSError as error:
                self._error = self._error or error


def file_sum(path: Path) -> FileSum:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def part_path(folder: Path, rank: int) -> Path:
    """Of the list of files that a rank has written."""
    return folder / f"dualpipe_files_{rank:05d}.json"


def write_part(folder: Path, rank: int, sums: Sums) -> None:
    """List what a rank has written: the last file that it writes."""
    _write(part_path(folder, rank), sums)


def merge_parts(folder: Path, world: int) -> None:
    """Make one list of those of all ranks.

    Raises:
        CheckpointError: one is missing.
    """
    parts = [part_path(folder, rank) for rank in range(world)]
    sums: Sums = {}
    for path in parts:
        sums |= _read(path)
    _write(folder / FILES, sums)
    for path in parts:
        path.unlink()


def listed(folder: Path) -> Sums | None:
    """The list of a checkpoint's files; None if it has none.

    Raises:
        CheckpointError: the list cannot be read.
    """
    return _read(folder / FILES) if (folder / FILES).is_file() else None


def changed(path: Path, sums: Mapping[str, FileSum] | None) -> str | None:
    """What is wrong with a file that is there: it is not the one that was saved. None if nothing is.

    Args:
        path: the file.
        sums: `listed` of its folder.
    """
    if sums is not None and path.name in sums:
        size, crc = file_sum(path)
        want, want_crc = sums[path.name]
        if size != want:
            return f"{path} has {size} bytes, not the {want} that were saved"
        return None if crc == want_crc else f"{path} is damaged: its CRC-32 is not that of what was saved"
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as file:
                bad = file.testzip()
        except Exception as error:  # a damaged table of contents may raise anything
            return f"{path} is damaged ({error})"
        if bad is not None:
            return f"{path} is damaged: the CRC-32 of {bad} in it is wrong"
    return None


def _write(path: Path, sums: Sums) -> None:
    text = json.dumps(sums, indent=1)
    write_text(path, json.dumps({"crc32": zlib.crc32(text.encode()), "files": sums}, indent=1))


def _read(path: Path) -> Sums:
    try:
        data = parse(path.read_text())
        sums = {str(name): (int(size), int(crc)) for name, (size, crc) in data["files"].items()}
        whole = data["crc32"] == zlib.crc32(json.dumps(sums, indent=1).encode())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not whole:
        raise CheckpointError(f"{path} is damaged: its CRC-32 is not that of what was saved")
    return sums
