"""What a Lightning program may do, against the stock Trainer in one process."""

from __future__ import annotations

import pytest
import torch
from ranks import RankError

pytest.importorskip("lightning")
import lightning_cases as runs

from dualpipe_engine.errors import ConfigError

#: The others run under --all.
FIRST = ("plain", "accumulated", "dict")


def check(case, stock, piped):
    rough = 2e-2 if case == "bf16-mixed" else 1e-6
    for rank, found in enumerate(piped):
        assert found["losses"] == pytest.approx(stock["losses"], abs=rough), (case, rank)
        assert found["val"] == pytest.approx(stock["val"], abs=rough), (case, rank)
        assert found["steps"] == stock["steps"], case
        torch.testing.assert_close(found["predicted"], stock["predicted"], rtol=0, atol=10 * rough)
    weights = piped[0]["weights"]
    assert not piped[1]["weights"]
    names = {"tied_modules.ends.weight": "first.weight", "1.": "blocks.0.", "2.": "blocks.1."}
    for name, value in weights.items():
        for ours, theirs in names.items() if case == "tied" else ():
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        torch.testing.assert_close(value, stock["weights"].pop(name), rtol=0, atol=20 * rough)
    assert not stock["weights"], case


def compare(ranks, folder, cases):
    stock, piped = folder / "stock", folder / "piped"
    [expected] = ranks.run(1, runs.all_cases, timeout=300, piped=False, folder=str(stock), cases=cases)
    found = ranks.run(2, runs.all_cases, timeout=300, piped=True, folder=str(piped), cases=cases)
    for case in cases:
        check(case, expected[case], [each[case] for each in found])
    return expected, found


@pytest.mark.all
def test_common_cases(ranks, tmp_path):
    expected, found = compare(ranks, tmp_path, FIRST)
    # gradients of the step are there for the hook before it: of both stages, on both ranks
    for each in found:
        assert each["plain"]["squares"] == pytest.approx(expected["plain"]["squares"], rel=1e-4)


@pytest.mark.all
def test_other_cases(ranks, tmp_path):
    _, found = compare(ranks, tmp_path, [case for case in runs.CASES if case not in FIRST])
    whole = sum(2 * value.nbytes for value in found[0]["zero-1"]["weights"].values())  # Adam's two moments
    assert 0.5 <= found[0]["zero-1"]["bytes"] / whole < 0.53  # of both stages each copy steps a half, and padding
    assert [each["zero-1"]["bytes"] for each in found] == ranks.run(2, runs.of_the_engine_alone)
    assert found[0]["phases"]["phases"] == {"PhasedChunk"}


@pytest.mark.all
def test_another_loss_than_that_of_the_batch_is_refused(ranks, tmp_path):
    with pytest.raises(RankError, match=r"Scaled\.training_step must call") as caught:
        ranks.run(2, runs.scaled, folder=str(tmp_path))
    assert {kind for kind, *_ in caught.value.errors.values()} == {"ConfigError"}


def test_a_forward_of_a_model_in_stages_names_what_calls_one():
    module = runs.Piped("zero")
    module.dualpipe_wrapper = torch.nn.Identity()
    with pytest.raises(ConfigError, match="leave out an example_input_array"):
        module(torch.zeros(2, 4))


@pytest.mark.all
def test_a_checkpoint_moves(ranks, tmp_path):
    folder = str(tmp_path)
    first = ranks.run(2, runs.half, folder=folder, strategy={})
    cases = [(2, {}), (4, {"schedule": "zb1p", "resume_elsewhere": True}), (2, {"resume_elsewhere": True})]
    rest = [ranks.run(world, runs.rest, folder=folder, strategy=how, devices=world)[0] for world, how in cases]
    assert len(first[0]) == 2 and len(rest[0]) == 4
    assert rest[0] == rest[2]
    assert rest[1] == pytest.approx(rest[0], abs=1e-6)


@pytest.mark.all
def test_one_module_in_several_runs(ranks, tmp_path):
    [expected] = ranks.run(1, runs.again_in_one, folder=str(tmp_path / "stock"))
    for evaluated, losses, one, predicted, said in ranks.run(2, runs.again, folder=str(tmp_path / "piped")):
        assert evaluated[0]["val_loss"] == pytest.approx(expected[0][0]["val_loss"], abs=1e-6)
        for each, other in zip(losses, expected[1], strict=True):
            assert each == pytest.approx(other, abs=1e-6)
        torch.testing.assert_close(one, predicted, rtol=0, atol=1e-6)
        assert "again.ckpt.engine is not there" in said


def test_layers_of_a_fitted_module_make_no_other(ranks, tmp_path):
    for said in ranks.run(2, runs.of_the_same_layers, folder=str(tmp_path)):
        assert len(said) == 2 and all("build new layers, or fit that module again" in each for each in said)


@pytest.mark.all
def test_statistics_of_batches(ranks, tmp_path):
    assert ranks.run(2, runs.with_batch_norm, folder=str(tmp_path), schedule="zb1p") == [16, -1]  # 4 of each batch
    with pytest.raises(RankError, match="each of its two copies would see half of them"):
        ranks.run(2, runs.with_batch_norm, folder=str(tmp_path), schedule="dualpipe")
