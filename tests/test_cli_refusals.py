"""Options that would be without effect are refused in one sentence."""

import json
import re

import pytest

from dualpipe_engine.cli.main import main
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate
from dualpipe_engine.viz.chrome import to_chrome

MODEL = ["compare", "--model", "mixtral-8x7b", "--gpus", "16", "--ranks", "4", "--micro-batches", "8"]
SHAPE = ["compare", "--ranks", "2", "--micro-batches", "2"]
CASES = [
    ([*MODEL, "--costs", "9,9,9", "--activation-cap", "0.0001"], ["--costs, --activation-cap", "leave them out"]),
    ([*MODEL, "--costs", "1,1,1,3"], ["--costs: no effect with --model", "leave it out"]),
    ([*MODEL, "--comm", "0"], ["--comm"]),
    ([*MODEL, "--optimize"], ["--optimize"]),
    ([*MODEL, "--layer-costs", "1x40"], ["--layer-costs"]),
    ([*MODEL, "--memory", "0"], ["--memory must be above 0", "80e9"]),
    ([*MODEL, "--hardware", ""], ["unknown hardware ''"]),
    ([*SHAPE, "--memory", "80e9"], ["--memory: no effect without --model"]),
    ([*SHAPE, "--gpus", "8"], ["--gpus: no effect without --model"]),
    ([*SHAPE, "--hardware", "h800", "--no-fp8"], ["--hardware, --no-fp8"]),
    ([*SHAPE, "--micro-batch-size", "1"], ["--micro-batch-size"]),
    ([*SHAPE, "--sequence-length", "4096", "--layer-costs", "1x8"], ["--sequence-length"]),
    ([*SHAPE, "--expert-parallel", "1"], ["--expert-parallel"]),
]


@pytest.mark.parametrize(("argv", "said"), CASES)
def test_compare(capsys, argv, said):
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert all(words in shown.err for words in said), shown.err


PLAN = ["plan", "--schedule", "interleaved", "--ranks", "4", "--micro-batches", "8"]
MEMORY = ["memory", "--config", "ds.json", "--ranks", "4"]
COUNTS = [
    (PLAN, ["--ranks", "--micro-batches", "--activation-cap", "--stages-per-rank", "--tries", "--offload-activations"]),
    (SHAPE, ["--ranks", "--micro-batches", "--stages-per-rank"]),
    (MODEL, ["--gpus", "--expert-parallel", "--micro-batch-size", "--sequence-length", "--sequence-parallel"]),
    (MEMORY, ["--ranks", "--micro-batches", "--replicas", "--stages-per-rank", "--sequence-length"]),
]
AMOUNTS = [
    (PLAN, ["--comm", "--copy"]),
    (SHAPE, ["--activation-cap"]),
    (MODEL, ["--memory"]),
    (MEMORY, ["--activation-bytes"]),
]


@pytest.mark.parametrize(
    ("argv", "option", "value"),
    [
        *(
            (argv, option, value)
            for argv, names in COUNTS
            for option in names
            for value in ("0", "-1", "4.0", "1" * 10)
        ),
        *((argv, option, value) for argv, names in AMOUNTS for option in names for value in ("-1", "nan", "1e99", "x")),
    ],
)
def test_numbers_that_make_no_sense(capsys, argv, option, value):
    with pytest.raises(SystemExit) as caught:
        main([*argv, option, value])
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        f"argument {option}[^ ]*: '{value}' is no (whole )?number from (1 to 999,999,999|0 to 1e.30)$", said
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "does not describe hardware: it holds no fields {...}"),
        ('{"like": 3}', "unknown hardware '3'"),
        ('{"like": "h800", "bf16": "x"}', "'bf16' of hardware 'h800' must be a number above 0, got 'x'"),
        ('{"like": "h800", "nvlink": null}', "'nvlink' of hardware 'h800' must be a number above 0, got None"),
        ('{"like": "h800", "gpus_per_node": 0}', "'gpus_per_node' of hardware 'h800' must be a number above 0, got 0"),
        ('{"like": "h800", "imbalance": NaN}', "'imbalance' of hardware 'h800' must be a number above 0, got nan"),
    ],
)
def test_files_that_describe_no_hardware(capsys, tmp_path, text, said):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    assert main([*MODEL, "--hardware", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and said in shown.err and shown.err.count("\n") == 1


def test_draw_of_a_trace(capsys, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": []}))
    assert main(["draw", str(path), "--costs", "1,1,1", "--ranks", "4"]) == 2
    assert "--ranks, --costs: no effect" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["--optimize"], ["--optimize", "--comm", "0.1", "--schedule", "1f1b"]])
def test_tries(capsys, given):
    assert main(["plan", "--schedule", "zb1p", "--ranks", "4", "--micro-batches", "6", "--tries", "9", *given]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "tries=9 has no effect" in shown.err and shown.err.count("\n") == 1


def test_a_cap_is_taken_where_it_applies(capsys):
    assert main(["compare", "--ranks", "4", "--micro-batches", "6", "--activation-cap", "2", "--format", "json"]) == 0
    rows = {row["schedule"]: row for row in json.loads(capsys.readouterr().out)["schedules"]}
    assert rows["vmin"]["feasible"] and rows["vmin"]["peak_activations"] <= 2
    assert not rows["1f1b"]["feasible"]


BF16 = {"enabled": True, "bf16_master_weights_and_grads": True}


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        ({"gradient_accumulation_steps": 0}, [], "above 0, got 0: say --micro-batches M"),
        ({"gradient_accumulation_steps": True}, [], "got True: say --micro-batches M"),
        ({"zero_optimization": True}, [], '"zero_optimization" must be a section'),
        ({"optimizer": "Adam"}, [], '"optimizer" must be a section'),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}, [], '"offload_optimizer" must be a section'),
        ({"bf16": {"enabled": "auto"}}, [], "must be true or false here, got 'auto'"),
        ({"bf16": BF16, "zero_optimization": {"stage": 1}}, [], "bf16_master_weights_and_grads"),
    ],
)
def test_memory_of_a_configuration(capsys, tmp_path, settings, given, said):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_accumulation_steps": 8} | settings))
    assert main(["memory", "--config", str(path), "--ranks", "4", "--params-per-stage", "1e3", *given]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and said in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_micro_batch_size_per_gpu": "auto"}, "say --micro-batch-size N"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 0}}, "say --expert-parallel N"),
        ({"expert_parallel": True}, '"expert_parallel" must be a section'),
        ({"expert_parallel": {"enabled": True, "top_k": 1}}, '"top_k": 1} is not what --model counts by'),
        ({"torch_autocast": {"enabled": True}}, '"torch_autocast" keeps activations in two widths'),
    ],
)
def test_memory_of_a_model(capsys, tmp_path, settings, said):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_accumulation_steps": 8} | settings))
    assert main(["memory", "--config", str(path), "--ranks", "4", "--model", "mixtral-8x7b"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["plan", "--schedule", "plan.svg"], ["draw", "plan.svg"]])
def test_a_file_that_is_no_plan(capsys, argv):
    assert main(argv) == 2
    assert "unknown schedule 'plan.svg'" in (shown := capsys.readouterr().err) and ".csv or .json" in shown


def test_the_mark_that_spreadsheets_and_editors_put_before_a_text(capsys, tmp_path):
    """UTF-8 with a byte order mark is read as without one."""
    shape = ["--schedule", "zbv", "--ranks", "2", "--micro-batches", "2"]
    texts = {
        "gpu.json": '{"like": "h800"}',
        "layers.json": "[1, 2, 3, 4]",
        "ds.json": '{"gradient_accumulation_steps": 8}',
    }
    for kind in ("csv", "json"):
        assert main(["plan", *shape, "--format", kind]) == 0
        texts[f"plan.{kind}"] = capsys.readouterr().out
    texts["trace.json"] = json.dumps(to_chrome(simulate(make_plan("zbv", 2, 2, CostModel()), CostModel())))
    path = {}
    for name, text in texts.items():
        path[name] = str(tmp_path / name)
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    for words in (
        ["plan", "--schedule", path["plan.csv"]],
        ["draw", path["plan.json"]],
        ["draw", path["trace.json"]],
        [*SHAPE, "--layer-costs", path["layers.json"]],
        [*MODEL, "--hardware", path["gpu.json"]],
        ["memory", "--config", path["ds.json"], "--ranks", "2", "--params-per-stage", "1e6"],
    ):
        assert main(words) == 0, capsys.readouterr().err
    (tmp_path / "plan.csv").write_text(texts["plan.csv"], encoding="utf-16")
    assert main(["plan", "--schedule", path["plan.csv"]]) == 2
    assert "plan.csv" in (said := capsys.readouterr().err) and "utf-8" in said
