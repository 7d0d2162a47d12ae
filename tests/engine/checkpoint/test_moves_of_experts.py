"""Experts and their optimizer state, saved under one layout and gone on with under others."""

from __future__ import annotations

import move_runs
import pytest

from dualpipe_engine.cli import main

#: (pipeline ranks, replicas, ranks that share experts, schedule)
LAYOUTS = [(2, 2, 2, "dualpipe"), (1, 4, 4, "1f1b"), (4, 1, 1, "zbv"), (2, 2, 2, "dualpipe")]
KEYS = ("ranks", "replicas", "experts", "schedule")


def links(model, folder, layouts, steps):
    """An uninterrupted run under the first layout, then the chain."""
    job = {"model": model, "folder": str(folder)}
    found = [job | dict(zip(KEYS, layouts[0], strict=True)) | {"steps": steps * len(layouts)}]
    for number, layout in enumerate(layouts):
        link = job | dict(zip(KEYS, layout, strict=True)) | {"steps": steps, "skip": steps * number}
        link |= {"save": str(number)} if number < len(layouts) - 1 else {}
        found.append(link | ({"load": f"{number - 1}u"} if number else {}))
    return found


@pytest.mark.all
def test_experts_move_to_another_number_of_ranks(ranks, tmp_path):
    for straight, one, two in ranks.run(4, move_runs.hops, links=links("ours", tmp_path, LAYOUTS[:2], 1)):
        assert [*one, *two] == pytest.approx(straight, rel=1e-6)
        assert straight[0] != pytest.approx(straight[1], rel=1e-3)


@pytest.mark.all
@pytest.mark.parametrize("model", ["adapted", "ours"])
def test_experts_move_through_all_layouts_and_back(ranks, tmp_path, model):
    chain = links(model, tmp_path, LAYOUTS, 2)
    again = chain[1] | {"load": "0u", "skip": 2, "save": None}
    for straight, *parts, same in ranks.run(4, move_runs.hops, links=[*chain, again]):
        assert [loss for losses in parts for loss in losses] == pytest.approx(straight, rel=1e-6)
        assert same == straight[2:4], "the same layout goes on to the last bit"
        assert len(set(straight)) == 8


def test_what_cannot_be_converted_is_one_sentence(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["convert", "--checkpoint", str(folder), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "no folder of one checkpoint" in said and said.count("\n") == 1
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", "dualpipe_rank_00000.pt"):
        (tmp_path / name).write_bytes(b"PK half")
    assert main(["convert", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "not whole" in capsys.readouterr().err
    (tmp_path / "layer_00-model_01-model_states.pt").touch()
    assert main(["convert", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "a part of a layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
