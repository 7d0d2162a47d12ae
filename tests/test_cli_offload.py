"""`--offload-activations`: what it does on each subcommand, and where it is refused."""

import json

import pytest

from dualpipe_engine.cli import main

PLAN = ("plan", "--schedule", "interleaved", "--ranks", "4", "--micro-batches", "16")


def answer(capsys, *arguments):
    assert main([*arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan(capsys, tmp_path):
    plain, one, everything = (
        answer(capsys, *PLAN, *more) for more in ((), ("--offload-activations", "1"), ("--offload-activations", "all"))
    )
    peaks = [found["peak_activations"] for found in (plain, one, everything)]
    assert peaks == [[11, 9, 7, 5], [10, 8, 6, 4], [3, 3, 3, 2]]
    assert plain["makespan"] == one["makespan"] == everything["makespan"]
    assert any("OFFLOAD" in op for op in one["programs"][0]) and not any("SEND" in op for op in one["programs"][0])
    lowered = answer(capsys, *PLAN, "--offload-activations", "1", "--with-comm")
    assert [op for op in lowered["programs"][0] if "LOAD" in op] == [op for op in one["programs"][0] if "LOAD" in op]
    assert "STEP" in lowered["programs"][0]
    slow = answer(capsys, *PLAN, "--offload-activations", "all", "--copy", "4")
    assert slow["makespan"] > plain["makespan"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(one))
    assert answer(capsys, "plan", "--schedule", str(path))["peak_activations"] == peaks[1]
    assert answer(capsys, "plan", "--schedule", str(path), "--copy", "9")["makespan"] > one["makespan"]
    assert main(["plan", "--schedule", str(path), "--offload-activations", "1"]) == 2
    assert "says itself which activations are offloaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--copy", "1"), "--copy is for --offload-activations"),
        (("--offload-activations", "0"), "'0' is no whole number from 1"),
        (("--offload-activations", "99"), "can the peak fall by more than 8 with 16 micro-batches: say 8, or"),
        (("--offload-activations", "1", "--copy", "-1"), "argument --copy: '-1' is no number from 0"),
    ],
)
def test_what_is_refused(capsys, given, said):
    try:
        code = main([*PLAN, *given])
    except SystemExit as end:
        code = end.code
    assert code == 2 and said in capsys.readouterr().err


def test_draw(capsys, tmp_path):
    path = tmp_path / "copies.svg"
    assert main(["draw", *PLAN[1:], "--offload-activations", "all", "--copy", "0.5", "--out", str(path)]) == 0
    assert "Copy to or from host memory" in path.read_text()
    assert main(["draw", *PLAN[1:], "--out", str(path)]) == 0
    assert "Copy to or from host memory" not in path.read_text()


def test_memory(capsys, tmp_path):
    path = tmp_path / "ds.json"
    found = {}
    for away in (False, 1, True, 0):
        path.write_text(json.dumps({"gradient_accumulation_steps": 16, "pipeline": {"offload_activations": away}}))
        given = ("memory", "--config", str(path), "--ranks", "4", "--params-per-stage", "1000")
        if away == 0 and away is not False:
            assert main([*given]) == 2
            assert '"offload_activations": ...}: Input should be' in capsys.readouterr().err
            continue
        rows = answer(capsys, *given, "--activation-bytes", "80")["schedules"]
        found[str(away)] = {row["schedule"]: [rank["activations"] for rank in row["ranks"]] for row in rows}
    assert found["False"]["interleaved"] == [11 * 40, 9 * 40, 7 * 40, 5 * 40]
    assert found["1"]["interleaved"] == [10 * 40, 8 * 40, 6 * 40, 4 * 40]
    assert found["True"]["interleaved"] == [3 * 40, 3 * 40, 3 * 40, 2 * 40]
    assert found["True"]["1f1b-deepspeed"] == found["False"]["1f1b-deepspeed"], "DeepSpeed's own does not offload"
