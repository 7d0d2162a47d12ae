"""Options that would be without effect are refused in one sentence."""

import json

import pytest

from dualpipe_engine.cli.main import main

MODEL = ["compare", "--model", "mixtral-8x7b", "--gpus", "16", "--ranks", "4", "--micro-batches", "8"]
SHAPE = ["compare", "--ranks", "2", "--micro-batches", "2"]
CASES = [
    ([*MODEL, "--costs", "9,9,9", "--activation-cap", "0.0001"], ["--costs, --activation-cap", "leave them out"]),
    ([*MODEL, "--costs", "1,1,1,3"], ["--costs: no effect with --model", "leave it out"]),
    ([*MODEL, "--comm", "0"], ["--comm"]),
    ([*MODEL, "--optimize"], ["--optimize"]),
    ([*MODEL, "--layer-costs", "1x40"], ["--layer-costs"]),
    ([*MODEL, "--memory", "0"], ["--memory must be above 0", "80e9"]),
    (["compare", "--model", "mixtral-8x7b", "--gpus", "0"], ["--gpus must be at least 1, got 0"]),
    ([*MODEL, "--micro-batch-size", "0"], ["--micro-batch-size must be at least 1, got 0"]),
    ([*MODEL, "--expert-parallel", "-1"], ["--expert-parallel must be at least 1, got -1"]),
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
        ({}, ["--micro-batches", "0"], "above 0, got 0: say --micro-batches M"),
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
