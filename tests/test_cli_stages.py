"""`--stages-per-rank`: what it does on each subcommand that makes plans, and where it is refused."""

import json

import pytest

from dualpipe_engine.cli import main
from dualpipe_engine.schedule.plan import Plan


def answer(capsys, *arguments):
    assert main([*arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def by_name(rows):
    return {row["schedule"]: row for row in rows["schedules"]}


SHAPE = ("--ranks", "4", "--micro-batches", "8")


def test_plan(capsys, tmp_path):
    found = answer(capsys, "plan", "--schedule", "interleaved", *SHAPE, "--stages-per-rank", "3")
    assert (found["placement"], found["stages_per_rank"], found["makespan"]) == ("loop", 3, pytest.approx(27))
    assert answer(capsys, "plan", "--schedule", "interleaved", *SHAPE)["stages_per_rank"] == 2
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(found))
    assert Plan.load(path).placement.num_stages == 12
    again = answer(capsys, "plan", "--schedule", str(path))
    assert {**again, "schedule": ""} == {**found, "schedule": ""}
    assert main(["plan", "--schedule", str(path), "--stages-per-rank", "3"]) == 2
    assert "leave --stages-per-rank out" in capsys.readouterr().err


def test_compare(capsys):
    two, four = (by_name(answer(capsys, "compare", *SHAPE, *more)) for more in ((), ("--stages-per-rank", "4")))
    assert two["interleaved"]["makespan"] == 28.5 and four["interleaved"]["makespan"] == 26.25
    assert four["zbv"]["makespan"] == two["zbv"]["makespan"]
    layers = ("--layer-costs", "0.2,1x14,3")
    cut = by_name(answer(capsys, "compare", *SHAPE, *layers, "--stages-per-rank", "4"))
    assert cut["interleaved"]["pairs"]["bounds"] == [*range(17)]
    job = ("compare", "--model", "deepseek-v3", "--gpus", "2048", "--micro-batches", "16", "--stages-per-rank", "3")
    assert by_name(answer(capsys, *job))["interleaved"]["memory"] > 0


def test_memory(capsys, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 8}))
    given = ("memory", "--config", str(path), "--ranks", "4", "--params-per-stage", "1000", "--activation-bytes", "80")
    rows = {v: by_name(answer(capsys, *given, "--stages-per-rank", str(v))) for v in (1, 2, 4)}
    kept = {v: [rank["activations"] for rank in row["interleaved"]["ranks"]] for v, row in rows.items()}
    assert {v: ranks[0] for v, ranks in kept.items()} == {1: 4 * 80, 2: 11 * 40, 4: 19 * 20}


def test_draw(capsys):
    assert main(["draw", "--schedule", "interleaved_zb", *SHAPE, "--stages-per-rank", "3"]) == 0
    assert "later stages of the rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("plan", "--schedule", "dualpipe", *SHAPE, "--stages-per-rank", "2"), "dualpipe has a fixed number of stages"),
        (("draw", "--schedule", "interleaved", *SHAPE, "--stages-per-rank", "999999999"), "at most 1,000,000 stages"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(capsys, arguments, text):
    main(arguments)
    printed = capsys.readouterr()
    assert text in " ".join((printed.err + printed.out).split())
