"""Files that are whole or not there."""

from __future__ import annotations

import os
import resource
import threading

import pytest

from dualpipe_engine.errors import DualPipeError
from dualpipe_engine.schedule.aside import write_whole
from dualpipe_engine.schedule.cuts.layer_times import write_layer_costs
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate
from dualpipe_engine.viz.chrome import write_chrome
from dualpipe_engine.viz.figure import save_figure

LINE = simulate(make_plan("1f1b", 2, 2), CostModel())
WRITERS = {
    "picture.svg": lambda path: save_figure(path, LINE),
    "picture.png": lambda path: save_figure(path, LINE),
    "trace.json": lambda path: write_chrome(path, LINE),
    "layers.json": lambda path: write_layer_costs(path, [1.0] * 100),
}


@pytest.fixture
def full_disk():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))  # the kernel refuses to let files grow
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, full_disk, name):
    path = tmp_path / name
    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        with pytest.raises((OSError, DualPipeError), match="too large"):
            WRITERS[name](path)
        assert [each.read_text() for each in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("first", "zweite ä"):
        write_whole(tmp_path / "link", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 2


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=write_whole, args=(tmp_path / "pipe", "text"))
    writer.start()
    assert (tmp_path / "pipe").read_text() == "text"
    writer.join()
