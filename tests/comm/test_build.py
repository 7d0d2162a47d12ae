"""The helper's library: whole and one's own, or it is not run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from torch.utils import cpp_extension

import dualpipe_engine
from dualpipe_engine.comm.build import build_helper, check_owner


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of extensions, and a compiler that takes what was built at install."""
    built = next(Path(dualpipe_engine.__file__).parent.glob("_comm*.so"), None)
    if built is None:
        pytest.skip("the helper was not built at install")
    tmp_path.chmod(0o755)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def load(name, sources, extra_cflags, build_directory):
        shutil.copy(built, Path(build_directory) / f"{name}.so")
        return "compiled"

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr("dualpipe_engine.comm.build._load", lambda library: "loaded")
    return tmp_path


def library(folder):
    return next(folder.rglob("dualpipe_comm.so"))


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "no sum"])
def test_a_library_that_is_not_what_was_built_is_built_again(folder, capsys, harm):
    assert (build_helper(), build_helper()) == ("compiled", "loaded")
    path = library(folder)
    data = path.read_bytes()
    if harm == "cut":
        os.truncate(path, len(data) // 2)
    elif harm == "empty":
        os.truncate(path, 0)
    elif harm == "no sum":
        path.with_suffix(".sha256").unlink()
    else:
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    capsys.readouterr()
    assert (build_helper(), build_helper()) == ("compiled", "loaded")
    assert capsys.readouterr().err.count("building the communication helper again") == 1
    assert path.read_bytes() == data


def test_a_build_that_was_killed_leaves_nothing_that_is_run(folder):
    build_helper()
    path = library(folder)
    (path.parent / "new").mkdir(exist_ok=True)
    (path.parent / "new" / "lock").touch()  # torch's own, on which it would wait for ever
    path.unlink()
    assert build_helper() == "compiled" and build_helper() == "loaded"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["library", "folder", "sum"])
def test_what_belongs_to_others_is_not_run(folder, what):
    build_helper()
    path = {"library": library(folder), "folder": library(folder).parent, "sum": library(folder).with_suffix(".sha256")}
    os.chown(path[what], 12345, -1)
    with pytest.raises(PermissionError, match="TORCH_EXTENSIONS_DIR"):
        build_helper()


def test_what_all_can_write_is_not_run(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="all can write it"):
        check_owner(tmp_path)
