"""Experts and their optimizer state, saved under one layout and gone on with under others."""

from __future__ import annotations

import move_runs
import pytest
import torch

from dualpipe_engine.cli import main

#: (pipeline ranks, replicas, ranks that share experts, schedule)
LAYOUTS = [(2, 2, 2, "dualpipe"), (1, 4, 4, "1f1b"), (4, 1, 1, "zbv"), (2, 2, 2, "dualpipe")]
KEYS = ("ranks", "replicas", "experts", "schedule")


def links(model, folder, layouts, steps, zero):
    """An uninterrupted run under the first layout, then the chain; ZeRO stages in turn, the first for the whole run.

    Args:
        steps: of each link.
    """
    job = {"model": model, "folder": str(folder)}
    found = [job | dict(zip(KEYS, layouts[0], strict=True)) | {"steps": sum(steps), "zero": zero[0]}]
    for number, layout in enumerate(layouts):
        link = job | dict(zip(KEYS, layout, strict=True)) | {"steps": steps[number], "skip": sum(steps[:number])}
        link |= {"save": str(number)} if number < len(layouts) - 1 else {}
        link |= {"zero": zero[number % len(zero)]}
        found.append(link | ({"load": f"{number - 1}u"} if number else {}))
    return found


@pytest.mark.all
@pytest.mark.parametrize("zero", [(0, 1), (1, 0)])
def test_experts_move_to_another_number_of_ranks(ranks, tmp_path, capsys, zero):
    """From ZeRO to a run without it too, and back."""
    layouts = [LAYOUTS[0], LAYOUTS[1]] if zero[0] == 0 else [*LAYOUTS[:2], LAYOUTS[0]]
    chain = links("ours", tmp_path, layouts, [1] * len(layouts), zero)
    for straight, *parts in ranks.run(4, move_runs.hops, links=chain):
        assert [loss for losses in parts for loss in losses] == pytest.approx(straight, rel=1e-6)
        assert straight[0] != pytest.approx(straight[1], rel=1e-3)
    if zero[0] == 0:
        (tmp_path / "0" / "expp_rank_1_mp_rank_00_optim_states.pt").unlink()
        assert main(["convert", "--checkpoint", str(tmp_path / "0"), "--out", str(tmp_path / "out")]) == 2
        assert "expp_rank_1_mp_rank_00_optim_states.pt is missing" in capsys.readouterr().err


@pytest.mark.all
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("model", ["adapted", "ours", "predicting"])
def test_experts_move_through_all_layouts_and_back(ranks, tmp_path, model, zero):
    """The last ten steps like those of an uninterrupted run; the same to the last bit where the layout is the same,
    whether converted or as saved."""
    chain = links(model, tmp_path, LAYOUTS, [2, 2, 2, 10], [zero])
    same = [
        chain[1] | {"load": load, "skip": 2, "steps": steps, "save": None} for load, steps in (("0u", 10), ("0", 2))
    ]
    for straight, *parts, converted, direct in ranks.run(4, move_runs.hops, 600, links=[*chain, *same]):
        assert [loss for losses in parts for loss in losses] == pytest.approx(straight, rel=1e-6)
        assert (converted, direct) == (straight[2:12], straight[2:4]), "the same layout goes on to the last bit"
        assert len(set(straight)) == 16


@pytest.mark.all
def test_groups_of_parameters_and_layers_that_share_with_fewer_ranks(ranks, tmp_path):
    """Options stay with the experts of each of the user's groups, whichever ranks keep them apart."""
    layouts = [LAYOUTS[2], LAYOUTS[1], LAYOUTS[0]]
    for straight, *parts in ranks.run(4, move_runs.hops, links=links("mixed", tmp_path, layouts, [1, 1, 2], (1, 0, 1))):
        assert [loss for losses in parts for loss in losses] == pytest.approx(straight, rel=1e-6)


def test_what_cannot_be_converted_is_one_sentence(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["convert", "--checkpoint", str(folder), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "no folder of one checkpoint" in said and said.count("\n") == 1
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", "dualpipe_rank_00000.pt"):
        (tmp_path / name).write_bytes(b"PK half")
    assert main(["convert", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "not whole" in capsys.readouterr().err
    torch.save({}, tmp_path / "dualpipe_rank_00000.pt")
    (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    for optimizer, text in ((None, "no optimizer's state"), ({"fp32_groups": []}, "fp16 without ZeRO")):
        torch.save({"optimizer": optimizer}, tmp_path / "mp_rank_00_model_states.pt")
        assert main(["convert", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        assert text in capsys.readouterr().err
    (tmp_path / "layer_00-model_01-model_states.pt").touch()
    assert main(["convert", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "a part of a layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
