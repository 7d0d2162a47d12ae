"""Checkpoints: resumed bit for bit, moved between schedules, and never half."""

from __future__ import annotations

import checkpoint_runs as runs
import pytest
import torch
import training
from ranks import RankError

from dualpipe_engine.engine.batches.loader import ResumableLoader, ResumableSampler
from dualpipe_engine.engine.checkpoint.files import PARTIAL, REPLACED, publish, settle, unfinished
from dualpipe_engine.errors import CheckpointError

STEPS, STOP = 8, 4
JOB = "01234567"


def config(schedule, zero=1, precision="fp32", micros=4, replicas=1, **sections):
    return training.settings(micros, replicas, zero, precision, schedule) | sections


@pytest.mark.parametrize(("zero", "precision", "world"), [(1, "bf16", 4), (2, "fp32", 2)])
def test_a_resumed_run_is_the_uninterrupted_one(ranks, tmp_path, zero, precision, world):
    job = {"config": config("dualpipe", zero, precision), "ranks": world, "folder": str(tmp_path)}
    whole = ranks.run(world, runs.train_from, steps=STEPS, save_at=[STOP], **job)
    resumed = ranks.run(world, runs.train_from, steps=STEPS, load=True, **job)
    for one, other in zip(whole, resumed, strict=True):
        assert one["losses"][STOP:] == other["losses"]
        assert (one["digests"], one["lr"]) == (other["digests"], other["lr"])
        assert other["client"]["mine"] == [1, 2]
    assert len(set(whole[0]["losses"])) > STEPS // 2


def test_the_data_goes_on_with_other_replicas(ranks, tmp_path):
    """Two replicas read 2 x 8 samples in the first step; one replica goes on with the 17th."""
    one = {"config": config("dualpipe", 1, micros=4, replicas=2), "folder": str(tmp_path)}
    ranks.run(4, runs.train_from, ranks=2, replicas=2, steps=1, save_at=[1], **one)
    settings = config("dualpipe", 0)
    sampler = ResumableSampler(runs.Tokens(), 1, 0)
    loader = ResumableLoader(torch.utils.data.DataLoader(runs.Tokens(), 2, sampler=sampler), sampler, 2)
    state = torch.load(tmp_path / "global_step1" / "dualpipe_rank_00000.pt", weights_only=False)
    assert settings and state["data"] == {"samples": 16}
    loader.load_state_dict(state["data"])
    assert torch.equal(next(loader)[0][0], runs.Tokens()[16][0])


def test_loader_passes_are_whole_after_a_resumed_one():
    data = list(range(10))

    def make(replicas=1, replica=0):
        sampler = ResumableSampler(data, replicas, replica)
        return ResumableLoader(torch.utils.data.DataLoader(data, 2, sampler=sampler), sampler, 2)

    first = make()
    straight = [next(first).tolist() for _ in range(12)]
    for stop in range(12):
        before, after = make(), make()
        for _ in range(stop):
            next(before)
        after.load_state_dict(before.state_dict())
        assert [next(after).tolist() for _ in range(12 - stop)] == straight[stop:]


@pytest.mark.parametrize("zero", [0, 1])
def test_weights_move_between_schedules(ranks, tmp_path, zero):
    job = {"ranks": 4, "folder": str(tmp_path), "load_optimizer_states": False}
    chain = [None, "dualpipe", "dualpipev", "1f1b", "zbv", "dualpipe", None]
    (first, *_) = ranks.run(4, runs.hop, config=config(None, zero), ranks=4, folder=str(tmp_path), save="0", steps=2)
    for number, schedule in enumerate(chain[1:]):
        found = ranks.run(4, runs.hop, config=config(schedule, zero), load=str(number), save=str(number + 1), **job)
        assert found[0]["before"] == pytest.approx(first["after"], rel=1e-6)


def test_weights_move_between_numbers_of_ranks_and_replicas(ranks, tmp_path):
    chain = [(None, 2, 2), ("dualpipe", 4, 1), ("dualpipev", 1, 4), (None, 4, 1), ("dualpipe", 2, 2)]
    after = None
    for number, (schedule, pp, replicas) in enumerate(chain):
        job = {"config": config(schedule, replicas=replicas), "ranks": pp, "replicas": replicas}
        load = {"load": str(number - 1), "load_optimizer_states": False} if number else {}
        found = ranks.run(4, runs.hop, folder=str(tmp_path), save=str(number), steps=1, **job, **load)
        if after is not None:
            assert found[0]["before"] == pytest.approx(after, rel=1e-6)
        after = found[0]["after"]


def test_the_optimizer_moves_to_other_replicas(ranks, tmp_path):
    """Saved by two replicas, gone on with by one: refused as it is, welcome once converted."""
    job = {"folder": str(tmp_path), "ranks": 2}
    one, two = config("dualpipe", micros=8), config("dualpipe", replicas=2)
    straight = ranks.run(4, runs.hop, config=two, replicas=2, steps=4, **job)
    saved = ranks.run(4, runs.hop, config=two, replicas=2, steps=2, save="2", **job)
    with pytest.raises(RankError, match="cut among 4 copies of each stage, not 2"):
        ranks.run(2, runs.hop, config=one, load="2", **job)
    runs.convert(tmp_path / "2", tmp_path / "2u")
    (tmp_path / "latest_universal").write_text("2u")
    one |= {"checkpoint": {"load_universal": True}}
    found = ranks.run(2, runs.hop, config=one, load="2u", merged=2, steps=2, skip=2, **job)
    assert found[0]["before"] == pytest.approx(saved[0]["after"], rel=1e-6)
    assert saved[0]["losses"] + found[0]["losses"] == pytest.approx(straight[0]["losses"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_optimizer_moves_through_universal_checkpoints(ranks, tmp_path, precision):
    """1F1B -> DualPipe -> DualPipeV -> 1F1B on other numbers of ranks, two steps each, like eight steps of one run."""
    chain = [(None, 4), ("dualpipe", 4), ("dualpipev", 2), (None, 2)]
    straight = ranks.run(4, runs.hop, config=config(None, 1, precision), ranks=4, folder=str(tmp_path), steps=8)
    losses, after = [], None
    for number, (schedule, pp) in enumerate(chain):
        universal = {"checkpoint": {"load_universal": True}} if number else {}
        found = ranks.run(
            pp,
            runs.hop,
            config=config(schedule, 1, precision, **universal),
            ranks=pp,
            folder=str(tmp_path),
            load=f"{number}u" if number else None,
            save=str(number + 1),
            steps=2,
            skip=2 * number,
        )
        if after is not None:
            assert found[0]["before"] == pytest.approx(after, rel=1e-6)
        after = found[0]["after"]
        losses += found[0]["losses"]
        runs.convert(tmp_path / str(number + 1), tmp_path / f"{number + 1}u")
        (tmp_path / "latest_universal").write_text(f"{number + 1}u")
    assert losses == pytest.approx(straight[0]["losses"], rel=1e-5 if precision == "fp32" else 2e-2)


def test_a_function_as_second_layer_does_not_stop_the_conversion(ranks, tmp_path):
    ranks.run(2, runs.save_with_a_function, config=config("dualpipe"), ranks=2, folder=str(tmp_path))
    runs.convert(tmp_path / "x", tmp_path / "u")
    assert (tmp_path / "u" / "zero" / "tied_modules.embed.table.weight" / "exp_avg.pt").is_file()


@pytest.mark.parametrize("broken", ["second", "first"])
def test_a_run_that_ends_while_saving_leaves_the_checkpoint_before(ranks, tmp_path, broken):
    job = {"config": config("dualpipe"), "ranks": 2, "folder": str(tmp_path)}
    with pytest.raises(RankError, match="Torn"):
        ranks.run(2, runs.torn_save, broken_tag=broken, **job)
    (partial,) = tmp_path.glob(f"{broken}.*{PARTIAL}")  # the second save had begun
    assert any(partial.iterdir())
    for found in ranks.run(2, runs.restored, **job):
        assert found["same"] and found["path"].endswith("first/mp_rank_00_model_states.pt")


def test_publishing_can_stop_anywhere(tmp_path):
    folder, partial = tmp_path / "tag", unfinished(tmp_path / "tag", JOB)
    folder.mkdir()
    (folder / "old_states.pt").touch()
    partial.mkdir()
    (partial / "new_states.pt").touch()
    folder.rename(tmp_path / f"tag.{JOB}{REPLACED}")  # killed between the two renames
    settle(tmp_path, None)
    assert (folder / "old_states.pt").exists() and not partial.exists()
    partial.mkdir()
    (partial / "new_states.pt").touch()
    publish(folder, JOB)
    settle(tmp_path, None)
    assert [path.name for path in folder.iterdir()] == ["new_states.pt"] and list(tmp_path.iterdir()) == [folder]


def test_what_other_jobs_and_people_have_written_stays(tmp_path):
    mine, theirs = unfinished(tmp_path / "tag", JOB), unfinished(tmp_path / "tag", "89abcdef")
    others = [tmp_path / name for name in ("notes.partial", "run.old.partial", f"{JOB}{PARTIAL}", "x.replaced")]
    for folder in (mine, theirs, *others):
        folder.mkdir()
    settle(tmp_path, elsewhere="89abcdef")
    assert sorted(tmp_path.iterdir()) == sorted([theirs, *others])
    settle(tmp_path, elsewhere=None)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_files_of_others_stay(tmp_path):
    folder, partial = tmp_path / "tag", unfinished(tmp_path / "tag", JOB)
    folder.mkdir()
    for name in ("notes.txt", "layer_07-model_states.pt", "dualpipe_rank_00003.pt"):
        (folder / name).write_text("old")
    (folder / "plots").mkdir()
    partial.mkdir()
    (partial / "layer_00-model_states.pt").write_text("new")
    publish(folder, JOB)
    assert sorted(path.name for path in folder.iterdir()) == ["layer_00-model_states.pt", "notes.txt", "plots"]
    assert list(tmp_path.iterdir()) == [folder]


def test_loading_writes_nothing(ranks, tmp_path):
    """Nor does it remove what another job is writing; a checkpoint whose successor was never published is found."""
    job = {"config": config("dualpipe"), "ranks": 2, "folder": str(tmp_path)}
    ranks.run(2, runs.hop, save="x", **job)
    unfinished(tmp_path / "x", JOB).mkdir()
    (tmp_path / "x").rename(tmp_path / f"x.{JOB}{REPLACED}")
    before = sorted(path.name for path in tmp_path.iterdir())
    ranks.run(2, runs.hop, load="x", **job)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_tags_that_name_no_checkpoint_are_refused_on_all_ranks(ranks, tmp_path):
    tags = ["", ".", "../x", "a/../b", str(tmp_path / "x"), "x/", "x\n", f"x{PARTIAL}", "x.replaced"]
    latest = ["", "../other", "/etc", "\x00", "x\ny"]
    outside = sorted(path.name for path in tmp_path.parent.iterdir())
    folder = tmp_path / "runs"
    folder.mkdir()
    found = ranks.run(
        2, runs.sentences, config=config("dualpipe"), ranks=2, folder=str(folder), tags=tags, latest=latest
    )
    for sentences, there, loss in found:
        assert all(sentences), sentences
        assert sentences == found[0][0] and there == ["latest"] and loss > 0
        assert "different checkpoints" in sentences[2 * len(tags)]
    assert sorted(path.name for path in tmp_path.parent.iterdir()) == outside
    assert (folder / "good" / "mp_rank_00_model_states.pt").is_file() and (folder / "latest").read_text() == "good"


@pytest.mark.parametrize(
    "name", ["layer_03-model_states.pt", "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00"]
)
@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_damaged_file_is_named(ranks, tmp_path, name, harm):
    job = {"config": config("dualpipe"), "ranks": 2, "folder": str(tmp_path)}
    ranks.run(2, runs.hop, save="good", **job)
    ranks.run(2, runs.hop, save="bad", **job)
    (file,) = (tmp_path / "bad").glob(f"{name}*")
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(RankError) as caught:
        ranks.run(2, runs.hop, load="bad", **job)
    for kind, message, _ in caught.value.errors.values():
        assert kind == "CheckpointError" and file.name in message and 'load tag="good"' in message
    assert len(caught.value.errors) == 2


def test_a_state_of_other_ranks_is_refused_with_the_remedy(ranks, tmp_path):
    ranks.run(4, runs.hop, config=config("1f1b"), ranks=4, folder=str(tmp_path), save="x")
    with pytest.raises(RankError) as caught:
        ranks.run(4, runs.hop, config=config("dualpipe"), ranks=4, folder=str(tmp_path), load="x")
    for kind, message, _ in caught.value.errors.values():
        assert kind == "CheckpointError" and "ds_to_universal" in message and "load_optimizer_states=False" in message


def test_tied_weights_without_a_file_are_refused():
    from types import SimpleNamespace

    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    from dualpipe_engine.engine.checkpoint.state import check_ties

    kept, lost = (TiedLayerSpec(key, training.Embed) for key in ("kept", "lost"))
    again = [TiedLayerSpec(key, training.Embed, forward_fn=training.head) for key in ("kept", "lost")]
    lost.forward_fn = training.head
    check_ties(SimpleNamespace(_layer_specs=[kept, LayerSpec(training.Block), again[0]]))
    with pytest.raises(CheckpointError, match="'lost'"):
        check_ties(SimpleNamespace(_layer_specs=[kept, lost, *again]))


def test_each_tensor_is_written_once(ranks, tmp_path):
    found = ranks.run(4, runs.files_written, config=config("dualpipe"), ranks=4, folder=str(tmp_path))
    paths = [path for rank in found for path in rank]
    assert len(paths) == len(set(paths))
    layers = [path for path in paths if path.startswith("layer_")]
    assert len(layers) == 10  # embedding, 8 blocks, norm; the tied head and the plain function have no file
