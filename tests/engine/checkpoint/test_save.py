"""Saving: what goes wrong costs the save alone, what is saved is what is loaded, and a thread may do it."""

from __future__ import annotations

import fcntl
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import save_runs as runs
import torch
import training
from ranks import RankError

from dualpipe_engine.engine.checkpoint.lock import NAME, FolderLock
from dualpipe_engine.engine.checkpoint.sums import FILES, changed, listed, merge_parts, write_part
from dualpipe_engine.engine.config import read_config
from dualpipe_engine.errors import CheckpointError, ConfigError


def config(zero=1, **sections):
    return training.settings(4, 1, zero, "fp32", "dualpipe") | sections


ASYNC = {"checkpoint": {"async": True}}


def test_a_save_in_the_background_is_that_of_a_plain_one(ranks, tmp_path):
    """Its files are those of the state at the call, although training goes on at once."""
    job = {"ranks": 2, "steps": 4, "save_at": 2}
    plain = ranks.run(2, runs.saved_and_resumed, config=config(), folder=str(tmp_path / "plain"), **job)
    aside = ranks.run(2, runs.saved_and_resumed, config=config(**ASYNC), folder=str(tmp_path / "aside"), **job)
    assert aside == plain
    for before, after in plain:
        assert before[2:] == after
    names = [sorted(path.name for path in (tmp_path / each / "x").iterdir()) for each in ("plain", "aside")]
    assert names[0] == names[1] and FILES in names[0]


def test_a_save_that_fails_costs_nothing_but_the_save(ranks, tmp_path):
    cases = {
        (lost, name): {
            "config": config(**sections),
            "ranks": 2,
            "folder": str(tmp_path / f"{lost} {name}"),
            "lost": lost,
            "background": bool(sections),
        }
        for lost in (0, 1)
        for name, sections in (("plain", {}), ("async", ASYNC))
    }
    everyone = ranks.run(2, training.each, call=runs.failing_save, cases=cases)
    for (lost, name), case in cases.items():
        found = [rank[lost, name] for rank in everyone]
        for error, losses, path in found:
            assert f"is not saved, and what was saved before stands: rank {lost}: OSError: [Errno 28]" in error
            assert losses == found[0][1] and path.endswith("first/mp_rank_00_model_states.pt")
        folders = sorted(path.name for path in Path(case["folder"]).iterdir() if path.is_dir())
        assert folders == ["again", "first"]


def test_a_folder_that_cannot_be_written_is_told_on_all_ranks(ranks, tmp_path):
    (tmp_path / "file").touch()
    for errors, path, loss in ranks.run(2, runs.unwritable, config=config(), ranks=2, folder=str(tmp_path)):
        assert len(errors) == 4 and all("rank 0" in error for error in errors)
        assert "File exists" in errors[0] and all("is the name of a file" in error for error in errors[1:])
        assert path.endswith("good/mp_rank_00_model_states.pt") and loss > 0


def test_a_run_that_ends_after_a_save_has_it_whole(ranks, tmp_path):
    """Without destroy(), and without another step."""
    ranks.run(2, runs.saved_at_the_end, config=config(**ASYNC), ranks=2, folder=str(tmp_path))
    assert (tmp_path / "latest").read_text() == "last" and (tmp_path / "last" / FILES).is_file()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["last"]


@pytest.mark.faults_all
def test_a_flipped_bit_anywhere_is_named(ranks, tmp_path):
    """In each kind of file, at a place drawn by chance; the checkpoint beside it still loads."""
    draw = random.Random(5)
    job = {"config": config(), "ranks": 2, "folder": str(tmp_path)}
    ranks.run(2, runs.saved_twice, **job)
    kinds = ("layer_03*", "mp_rank_00*", "zero_pp_rank_0*", "dualpipe_rank_00001*", "dualpipe.json", FILES)
    files = [*(next((tmp_path / "bad").glob(kind)) for kind in kinds), tmp_path / "latest"]
    flips = {str(path): (draw.randrange(path.stat().st_size), draw.randrange(8)) for path in files}
    for found in ranks.run(2, runs.loads_of_flipped, flips=flips, **job):
        assert "is missing" in found[-1] or "is no name of a folder" in found[-1]
        for path, text in zip(files[:-1], found[:-1], strict=True):
            assert path.name in text and 'load tag="good"' in text, text


def test_sums_of_stock_files_are_those_of_torch(tmp_path):
    path = tmp_path / "layer_00-model_states.pt"
    torch.save({"weight": torch.arange(1000)}, path)
    assert changed(path, None) is None
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert path.name in changed(path, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"files": 3}',
        '{"files": {"x": [1]}, "crc32": 0}',
        '{"files": {"x": [1, 2]}, "crc32": 0}',
        "[" * 9999,
    ],
)
def test_a_list_that_cannot_be_read_is_one_sentence(tmp_path, text):
    (tmp_path / FILES).write_text(text)
    with pytest.raises(CheckpointError, match=FILES):
        listed(tmp_path)


def test_lists_of_all_ranks_make_one(tmp_path):
    write_part(tmp_path, 0, {"a": (1, 2)})
    with pytest.raises(CheckpointError, match="dualpipe_files_00001"):
        merge_parts(tmp_path, 2)
    write_part(tmp_path, 1, {"b": (3, 4)})
    merge_parts(tmp_path, 2)
    assert listed(tmp_path) == {"a": (1, 2), "b": (3, 4)} and [path.name for path in tmp_path.iterdir()] == [FILES]


def test_one_job_at_a_time_saves_into_a_folder(tmp_path):
    first = FolderLock(tmp_path, "00000001", 1.0)
    with pytest.raises(CheckpointError, match=r"another job \(process \d+ on .*give each job a folder"):
        FolderLock(tmp_path, "00000002", 0.0)
    got = []
    waiting = threading.Thread(target=lambda: got.append(FolderLock(tmp_path, "00000002", 60.0)))
    waiting.start()
    first.release()
    waiting.join()
    assert got[0].elsewhere is None
    got[0].release()


def test_a_job_of_another_machine_is_known_although_its_lock_is_not_seen(tmp_path):
    (tmp_path / NAME).write_text(json.dumps({"job": "00000009", "boot": "of another", "host": "far", "pid": 1}))
    lock = FolderLock(tmp_path, "00000001", 0.0)
    assert lock.elsewhere == "00000009"
    lock.release()
    assert (tmp_path / NAME).read_text() == ""


def test_a_file_system_without_locks_saves_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    FolderLock(tmp_path, "00000001", 0.0).release()


def test_two_jobs_that_save_the_same_tag_lose_nothing(ranks, tmp_path):
    """The one that comes second is told; its own folder is whole."""
    for error, kept in ranks.run(2, runs.two_jobs, config=config(), ranks=2, folder=str(tmp_path)):
        assert "another job has saved" in error and "a folder of its own" in error and kept


@pytest.mark.all
@pytest.mark.faults_all
def test_two_jobs_at_the_same_time_lose_nothing(ranks, tmp_path):
    """What a job was told is saved is there; a tag that both want is that of one of them, whole."""
    job = {"config": config(), "ranks": 2, "folder": str(tmp_path)}
    with ThreadPoolExecutor(2) as pool:
        runs_of = {
            name: pool.submit(ranks.run, 2, runs.saves_beside_another_job, name=name, **job) for name in ("a", "bb")
        }
        found = {name: run.result() for name, run in runs_of.items()}
    tags = [f"{name}{step}" for name in found for step in range(4)]
    loaded = ranks.run(2, runs.digests_of, tags=[*tags, "both"], **job)
    for rank in range(2):
        (a, refused_a), (b, refused_b) = found["a"][rank], found["bb"][rank]
        assert all(loaded[rank][tag] == (a | b)[tag] for tag in tags)
        assert loaded[rank]["both"] in (a.get("both"), b.get("both"))
        refused = refused_a | refused_b
        assert set(refused) == {"both"} and "another job has saved" in refused["both"]
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.replaced"))


def test_what_a_layer_file_holds_is_not_unpickled(ranks, tmp_path):
    with pytest.raises(RankError) as caught:
        ranks.run(2, runs.loaded_with_a_pickle, config=config(), ranks=2, folder=str(tmp_path))
    assert all(kind == "CheckpointError" and "layer_03" in text for kind, text, _ in caught.value.errors.values())
    assert not (tmp_path / "unpickled").exists()


def test_async_is_for_our_schedules_and_true_or_false():
    for section, text in (({"schedule": "dualpipe"}, "true or false, got 'yes'"), ({}, "is for our schedules")):
        value = "yes" if section else True
        with pytest.raises(ConfigError, match=text):
            read_config({"train_batch_size": 4, "pipeline": section, "checkpoint": {"async": value}})
