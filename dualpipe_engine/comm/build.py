"""The C++ helper as it is built on first use: once a machine, kept in torch's folder of extensions.

A library is built aside, imported, and then put in its place together with its SHA-256. One that is not what was built,
as on a full disk or after a crash, is built again; nothing of it is run. What belongs to others is not run either.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import stat
import sys
from pathlib import Path
from types import ModuleType

import torch

_NAME = "dualpipe_comm"


def build_helper() -> ModuleType:
    """Build the helper, or load what an earlier process has built; one process of a machine builds, the others wait.

    Raises:
        FileNotFoundError: the sources are not installed.
        PermissionError: others could have written what would be run.
        RuntimeError: it does not compile; of torch.
    """
    package = Path(__file__).parent.parent
    folder = next((path for path in (package / "csrc", package.parent / "csrc") if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError("the C++ sources are not installed")
    files = sorted(folder.glob("*.h")) + sorted(folder.glob("*.cpp"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in files) + torch.__version__.encode()).hexdigest()[:12]
    from torch.utils import cpp_extension

    build = Path(cpp_extension._get_build_directory(f"{_NAME}_{key}", verbose=False))
    check_owner(build)
    library, sum_file = build / f"{_NAME}.so", build / f"{_NAME}.sha256"
    with (build / "dualpipe.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_whole(library, sum_file):
            return _load(library)
        again = " again, since the library is not what was built" if library.exists() else ", once"
        print(f"dualpipe_engine: building the communication helper{again}", file=sys.stderr, flush=True)
        aside = build / "new"
        shutil.rmtree(aside, ignore_errors=True)  # of a process that died while it built
        aside.mkdir()
        sources = [str(path) for path in files if path.suffix == ".cpp"]
        flags = ["-O2", "-g0", "-Wall", "-Wextra"]
        module = cpp_extension.load(_NAME, sources, extra_cflags=flags, build_directory=aside)
        sum_file.write_text(_digest(aside / library.name))
        os.replace(aside / library.name, library)
        return module


def check_owner(path: Path) -> None:
    """A file or folder that holds code must be this user's, or the system's.

    Raises:
        PermissionError: it is another user's, or all can write it.
    """
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & stat.S_IWOTH:
        raise PermissionError(
            f"{path} is another user's, or all can write it: remove it, or set TORCH_EXTENSIONS_DIR to your own folder"
        )


def is_whole(library: Path, sum_file: Path) -> bool:
    """Whether a library is there and the one that was built.

    Raises:
        PermissionError: others could have written it.
    """
    if not (library.is_file() and sum_file.is_file()):
        return False
    check_owner(library)
    check_owner(sum_file)
    return sum_file.read_text(errors="replace") == _digest(library)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
