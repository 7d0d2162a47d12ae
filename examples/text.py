"""Bytes of a folder of text files as a dataset; by default the source files of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__", "lib2to3"}


def read_folder(folder: str | None, limit: int = 8_000_000) -> np.ndarray:
    """All bytes of the text files below `folder`, in a fixed order, at most `limit`.

    Raises:
        SystemExit: the folder holds no text.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    suffixes = {".py"} if folder is None else {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".json", ".html", ""}
    parts, size = [], 0
    for path in sorted(root.rglob("*")):
        if size >= limit or path.suffix not in suffixes or SKIPPED & set(path.relative_to(root).parts[:-1]):
            continue
        if path.is_file():
            data = path.read_bytes()
            if b"\0" not in data[:4096]:
                parts.append(data)
                size += len(data)
    if size < 10_000:
        raise SystemExit(f"{root} holds {size} bytes of text files; give a folder with more")
    return np.frombuffer(b"\n".join(parts), dtype=np.uint8)[:limit]


class Windows(Dataset):
    """`count` windows of `length` bytes at places drawn with `seed`: (bytes, next bytes), each `[length]` int64."""

    def __init__(self, data: np.ndarray, length: int, count: int, seed: int) -> None:
        self._data, self._length = data, length
        self._starts = np.random.default_rng(seed).integers(0, len(data) - length - 1, count)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = self._starts[index]
        window = torch.from_numpy(self._data[start : start + self._length + 1].astype(np.int64))
        return window[:-1], window[1:]
