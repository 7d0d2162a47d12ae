"""Checkpoints: resumed bit for bit, moved between schedules, and never half."""

from __future__ import annotations

import itertools
import shutil

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


@pytest.fixture(scope="module")
def good(ranks, tmp_path_factory):
    """A folder with the checkpoint "good" of two ranks under DualPipe, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    ranks.run(2, runs.hop, config=config("dualpipe"), ranks=2, folder=str(folder), save="good")
    return folder


CHAINS = {
    "schedules": [(schedule, 4, 1, 0) for schedule in (None, "dualpipe", "dualpipev", "1f1b", "zbv", "dualpipe", None)],
    "schedules, ZeRO-1": [(schedule, 4, 1, 1) for schedule in (None, "dualpipev", "dualpipe", None)],
    "ranks and replicas": [
        *((None, 2, 2, 1), ("dualpipe", 4, 1, 1), ("dualpipev", 1, 4, 1), (None, 4, 1, 1), ("dualpipe", 2, 2, 1))
    ],
}


@pytest.mark.parametrize(
    "name", ["schedules", "ranks and replicas", pytest.param("schedules, ZeRO-1", marks=pytest.mark.all)]
)
def test_weights_move(ranks, tmp_path, name):
    """Between schedules, numbers of ranks and replicas, and DeepSpeed's own engine; trained on at both ends."""
    links = []
    for number, (schedule, pp, replicas, zero) in enumerate(CHAINS[name]):
        job = {"config": config(schedule, zero, replicas=replicas), "ranks": pp, "replicas": replicas}
        load = {"load": str(number - 1), "load_optimizer_states": False} if number else {}
        steps = 1 if number in (0, len(CHAINS[name]) - 2) else 0
        links.append({"folder": str(tmp_path), "save": str(number), "steps": steps, **job, **load})
    found = ranks.run(4, runs.hops, links=links)[0]
    for before, link in itertools.pairwise(found):
        assert link["before"] == pytest.approx(before["after"], rel=1e-6)
    assert len({link["after"] for link in found}) >= 2, "trained"


def test_the_optimizer_moves_to_other_replicas(ranks, tmp_path):
    """Saved by two replicas, gone on with by one: refused as it is, welcome once converted."""
    job = {"folder": str(tmp_path), "ranks": 2}
    one, two = config("dualpipe", micros=8), config("dualpipe", replicas=2)
    first = {"config": two, "replicas": 2, **job}
    straight, saved = ranks.run(
        4, runs.hops, links=[first | {"steps": 4}, first | {"steps": 2, "save": "2", "universal": True}]
    )[0]
    with pytest.raises(RankError, match="cut among 4 copies of each stage, not 2"):
        ranks.run(2, runs.hop, config=one, load="2", **job)
    one |= {"checkpoint": {"load_universal": True}}
    found = ranks.run(2, runs.hop, config=one, load="2u", merged=2, steps=2, skip=2, **job)
    assert found[0]["before"] == pytest.approx(saved["after"], rel=1e-6)
    assert saved["losses"] + found[0]["losses"] == pytest.approx(straight["losses"], rel=1e-5)


def test_the_optimizer_moves_through_universal_checkpoints(ranks, tmp_path):
    """1F1B -> DualPipe -> DualPipeV -> 1F1B on other numbers of ranks, two steps each, like eight steps of one run."""
    chain = [(None, 4), ("dualpipe", 4), ("dualpipev", 2), (None, 2)]

    def link(number, precision):
        schedule, pp = chain[number]
        universal = {"checkpoint": {"load_universal": True}} if number else {}
        if schedule == "dualpipe":
            universal["zero_optimization"] = {"stage": 1, "round_robin_gradients": True}
        job = {"config": config(schedule, 1, precision, **universal), "ranks": pp, "folder": str(tmp_path / precision)}
        job |= {"load": f"{number}u"} if number else {}
        return job | {"save": str(number + 1), "steps": 2, "skip": 2 * number, "universal": number < 3}

    limits = {"fp32": 1e-5, "bf16": 2e-2}
    straight = [
        {"config": config(None, 1, precision), "ranks": 4, "folder": str(tmp_path), "steps": 8} for precision in limits
    ]
    halves = [straight + [link(number, precision) for precision in limits for number in (0, 1)]]
    halves += [[link(number, precision) for precision in limits for number in (2, 3)]]
    (*whole, one, two, five, six), (three, four, seven, eight) = (
        ranks.run(world, runs.hops, links=links)[0] for world, links in zip((4, 2), halves, strict=True)
    )
    for expected, parts, limit in zip(
        whole, ((one, two, three, four), (five, six, seven, eight)), limits.values(), strict=True
    ):
        for before, after in itertools.pairwise(parts):
            assert after["before"] == pytest.approx(before["after"], rel=1e-6)
        losses = [loss for part in parts for loss in part["losses"]]
        assert losses == pytest.approx(expected["losses"], rel=limit)


def test_another_order_of_parameters_is_refused(ranks, tmp_path):
    job = {"folder": str(tmp_path), "ranks": 2}
    in_turns = {"zero_optimization": {"stage": 1, "round_robin_gradients": True}}
    ranks.run(2, runs.hop, config=config("dualpipe", **in_turns), save="1", **job)
    with pytest.raises(RankError, match='another order of parameters, which "round_robin_gradients" changes'):
        ranks.run(2, runs.hop, config=config("dualpipe"), load="1", **job)


def test_a_function_as_second_layer_does_not_stop_the_conversion(ranks, tmp_path):
    ranks.run(2, runs.save_with_a_function, config=config("dualpipe"), ranks=2, folder=str(tmp_path))
    runs.convert(tmp_path / "x", tmp_path / "u")
    assert (tmp_path / "u" / "zero" / "tied_modules.embed.table.weight" / "exp_avg.pt").is_file()


def test_a_run_that_ends_while_saving_leaves_the_checkpoint_before(ranks, tmp_path):
    job = {"config": config("dualpipe"), "ranks": 2}
    cases = {broken: job | {"folder": str(tmp_path / broken)} for broken in ("second", "first")}
    for broken, case in cases.items():
        with pytest.raises(RankError, match="Torn"):
            ranks.run(2, runs.torn_save, broken_tag=broken, **case)
        (partial,) = (tmp_path / broken).glob(f"{broken}.*{PARTIAL}")  # the second save had begun
        assert any(partial.iterdir())
    for rank in ranks.run(2, training.each, call=runs.restored, cases=cases):
        for found in rank.values():
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


def test_loading_writes_nothing(ranks, good, tmp_path):
    """Nor does it remove what another job is writing; a checkpoint whose successor was never published is found."""
    shutil.copytree(good / "good", tmp_path / f"x.{JOB}{REPLACED}")
    unfinished(tmp_path / "x", JOB).mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    ranks.run(2, runs.hop, config=config("dualpipe"), ranks=2, folder=str(tmp_path), load="x")
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


def test_what_is_damaged_or_of_other_ranks_is_named_with_the_remedy(ranks, good, tmp_path):
    job = {"config": config("dualpipe"), "ranks": 2}
    cases, harmed = {"1f1b": job | {"config": config("1f1b"), "folder": str(good), "load": "good"}}, {}
    for name in ("layer_03-model_states.pt", "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00"):
        for harm in ("gone", "cut"):
            folder = tmp_path / f"{name} {harm}"
            for tag in ("good", "bad"):
                shutil.copytree(good / "good", folder / tag)
            (file,) = (folder / "bad").glob(f"{name}*")
            if harm == "gone":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            cases[folder.name] = job | {"folder": str(folder), "load": "bad"}
            harmed[folder.name] = file.name
    for rank in ranks.run(2, training.refusals, call=runs.hop, cases=cases):
        kind, message = rank.pop("1f1b")
        assert kind == "OtherRanksError" and "dualpipe convert" in message and "load_optimizer_states=False" in message
        assert rank.keys() == harmed.keys()
        for name, (kind, message) in rank.items():
            assert kind == "CheckpointError" and harmed[name] in message and 'load tag="good"' in message, name


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
