"""The `dualpipe` command: outputs, exit codes, errors on one line, no torch, wide plans in time."""

import base64
import json
import os
import resource
import shlex
import subprocess
import sys

import pytest

from dualpipe_engine.cli import main
from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.passes.lower import lower
from dualpipe_engine.schedule.plan import Plan
from dualpipe_engine.schedule.search.compare import compare
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate
from dualpipe_engine.viz.chrome import write_chrome

PAPER = ["--schedule", "dualpipe", "--ranks", "8", "--micro-batches", "20"]
WIDE = ["plan", "--schedule", "dualpipe", "--ranks", "64", "--micro-batches", "2048"]

# Runs the command in a process that cannot import the modules named first.
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Block())
from dualpipe_engine.cli import main
sys.exit(main(sys.argv[2:]))
"""


def run(*argv, blocked="torch,deepspeed,matplotlib"):
    return subprocess.run([sys.executable, "-c", BLOCKED, blocked, *argv], capture_output=True, text=True, timeout=120)


def output(capsys, *argv):
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("name", SCHEDULES)
def test_json_of_a_plan(capsys, name):
    data = json.loads(
        output(capsys, "plan", "--schedule", name, "--ranks", "4", "--micro-batches", "8", "--format=json")
    )
    plan = make_plan(name, 4, 8)
    timeline = simulate(plan, CostModel(fb=3.0).for_placement(plan.placement))
    assert (data["schedule"], data["ranks"], data["micro_batches"]) == (name, 4, 8)
    assert data["programs"] == plan.texts()
    assert data["makespan"] == timeline.makespan >= data["lower_bound"] > 0
    assert data["bubble"] == timeline.bubble()
    assert data["peak_activations"] == peak_activations(plan)


def test_costs_comm_cap_and_optimize_reach_the_plan(capsys):
    shape = ["plan", "--schedule", "dualpipe", "--ranks", "8", "--micro-batches", "16", "--format", "json"]

    def makespan(*more):
        return json.loads(output(capsys, *shape, *more))["makespan"]

    # Published in the table of reference makespans: reference order, with overlap, best order without overlap.
    assert (makespan(), makespan("--costs", "1,1,1,2.25"), makespan("--optimize")) == (54, 46.5, 51)
    assert makespan("--costs", "1,1,1") == 54 and makespan("--costs", "2,2,2") == 108
    assert makespan("--comm", "0.1") > 54
    assert main([*shape, "--activation-cap", "4"]) == 2
    assert "activation_cap = 4" in capsys.readouterr().err


def test_csv_and_json_of_a_plan_are_plan_files(capsys, tmp_path):
    plan = make_plan("dualpipe", 8, 20)
    for ending in ("csv", "json"):
        path = tmp_path / f"plan.{ending}"
        path.write_text(output(capsys, "plan", *PAPER, "--format", ending))
        assert Plan.load(path) == plan
        again = output(capsys, "plan", "--schedule", str(path), "--format", "csv")
        assert again == plan.to_csv()
    assert "makespan 66," in " ".join(output(capsys, "draw", str(path)).split())


def test_with_comm_shows_the_lowered_plan(capsys, tmp_path):
    lowered = lower(make_plan("dualpipe", 8, 20))
    path = tmp_path / "lowered.csv"
    path.write_text(output(capsys, "plan", *PAPER, "--format", "csv", "--with-comm"))
    assert Plan.load(path) == lowered
    assert output(capsys, "plan", "--schedule", str(path), "--format", "csv") == lowered.compute_only().to_csv()
    assert output(capsys, "plan", "--schedule", str(path), "--format", "csv", "--with-comm") == lowered.to_csv()


def test_table_of_a_plan_has_a_summary(capsys):
    text = " ".join(output(capsys, "plan", *PAPER).split())
    assert "makespan 66, largest bubble 6 (9%), lower bound" in text
    assert "at most 9 activations alive on a rank" in text


def test_draw_in_the_terminal_and_to_files(capsys, tmp_path):
    assert "FFFFFFFfiwfiwfiwfF&b   f&B" in output(capsys, "draw", *PAPER)
    for name in ("schedule.svg", "schedule.png"):
        assert output(capsys, "draw", *PAPER, "--out", str(tmp_path / name)) == ""
        assert (tmp_path / name).stat().st_size > 10_000


def test_draw_a_trace(capsys, tmp_path):
    path = tmp_path / "trace.json"
    write_chrome(path, simulate(make_plan("1f1b", 2, 2), CostModel()))
    text = output(capsys, "draw", str(path))
    assert text.startswith("trace.json, makespan 9 s, largest bubble 3 s (33%)")
    assert "Device 1" in text and "forward" in text


def test_compare_as_table_and_json(capsys):
    argv = ["compare", "--ranks", "7", "--micro-batches", "16", "--costs", "1,1,1,2.25"]
    table = " ".join(output(capsys, *argv).split())
    assert "> dualpipev" in table and "lower bound" in table and "needs an even number" in table
    data = json.loads(output(capsys, *argv, "--format", "json"))
    rows = compare(7, 16, CostModel(fb=2.25), optimize=False)
    assert [row["schedule"] for row in data["schedules"]] == list(SCHEDULES)
    for row, found in zip(rows, data["schedules"], strict=True):
        assert found["makespan"] == (row.makespan if row.feasible else None)
        assert (found["parameter_copies"], found["reason"]) == (row.parameter_copies, row.reason)
        assert found["lower_bound"] is None or found["lower_bound"] <= found["makespan"]
    assert [row["schedule"] for row in data["schedules"] if row["fastest"]] == ["dualpipev"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["plan"], "--schedule"),
        (["plan", "--schedule", "dualpipe"], "--ranks N and --micro-batches M"),
        (["plan", "--schedule", "dualpip", "--ranks", "8", "--micro-batches", "20"], "did you mean 'dualpipe'"),
        (["plan", "--schedule", "dualpipe", "--ranks", "7", "--micro-batches", "20"], "even number"),
        (["plan", "--schedule", "nowhere.csv"], "nowhere.csv"),
        (["plan", "--schedule", "{plan}", "--ranks", "4"], "--ranks 2, not 4"),
        (["plan", "--schedule", "{plan}", "--optimize"], "--optimize"),
        (["draw", "nowhere.json"], "nowhere.json"),
        (["draw", "{plan}", "--schedule", "1f1b"], "not both"),
        (["draw", "{plan}", "--out", "x.pdf"], ".svg or .png"),
        (["draw", "{plan}", "--out", ""], ".svg or .png"),
        (["draw", "", "--schedule", "1f1b"], "not both"),
        (["draw", "{trace}"], "traceEvents"),
    ],
)
def test_requests_that_cannot_work(capsys, tmp_path, argv, reason):
    plan, trace = tmp_path / "plan.csv", tmp_path / "trace.json"
    plan.write_text(make_plan("1f1b", 2, 2).to_csv())
    trace.write_text('{"events": []}')
    assert main([part.format(plan=plan, trace=trace) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert reason in captured.err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["paint"],
        ["plan", *PAPER, "--costs", "1,1"],
        ["plan", *PAPER, "--costs", "1,1,-1"],
        ["plan", *PAPER, "--costs", "1,1,nan"],
        ["plan", *PAPER, "--comm", "inf"],
    ],
)
def test_malformed_command_lines_exit_with_two(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_a_plan_that_cannot_complete_is_refused(capsys, tmp_path):
    path = tmp_path / "broken.csv"
    path.write_text("0F0,0B0\n1B0,1F0\n")
    assert main(["plan", "--schedule", str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("command", [[], ["plan"], ["draw"], ["compare"]])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "examples:" in text and "exit codes:" in text
    assert "bubble" in text if not command else "Any unit" in text


@pytest.mark.parametrize(
    "argv", [["plan", *PAPER], ["draw", *PAPER], ["compare", "--ranks", "4", "--micro-batches", "8"]]
)
def test_commands_need_neither_torch_nor_matplotlib(argv):
    done = run(*argv)
    assert (done.returncode, done.stderr) == (0, "")


def test_json_and_csv_do_without_rich():
    for ending in ("json", "csv"):
        assert run("plan", *PAPER, "--format", ending, blocked="torch,matplotlib,rich").returncode == 0


def test_pictures_need_no_torch(tmp_path):
    done = run("draw", *PAPER, "--out", str(tmp_path / "a.svg"), blocked="torch,deepspeed")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("ending", ["table", *(pytest.param(each, marks=pytest.mark.all) for each in ("json", "csv"))])
def test_139_202_ops_take_in_proportion_no_longer_than_a_sixteenth(ending):
    seconds = []
    for micros in ("128", "2048"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = run(*WIDE[:-1], micros, "--format", ending)
        seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        assert done.returncode == 0
    assert seconds[1] < 2 * 16 * seconds[0]  # with the start of Python in both
    if ending == "table":
        assert "139,202 ops" in done.stdout and len(done.stdout.splitlines()) < 300


@pytest.mark.parametrize(
    ("argv", "read"),
    [(["plan", *PAPER, "--format", "csv"], 0), (["plan", *PAPER], 0), ([*WIDE, "--format", "csv"], 10)],
)
def test_a_reader_that_goes_away_is_quiet(argv, read):
    command = [sys.executable, "-m", "dualpipe_engine.cli", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    process.stdout.read(read)
    process.stdout.close()  # before the first write where nothing is read: the process is still starting
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) in ((0, 1) if read else (1,))


@pytest.mark.parametrize(
    ("argv", "closed", "code"),
    [
        (["plan", *PAPER], ">&-", 0),
        (["plan", *PAPER[:-2]], "2>&-", 2),
        (["draw", *PAPER, "--out", "a.svg"], "<&- >&- 2>&-", 0),
    ],
)
def test_closed_streams_are_dev_null(tmp_path, argv, closed, code):
    """A drawing does not land where the output would, nor an error in the output."""
    line = shlex.join([sys.executable, "-m", "dualpipe_engine.cli", *argv])
    done = subprocess.run(f"{line} {closed}", shell=True, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert all(path.read_text().endswith("</svg>\n") for path in tmp_path.iterdir())


@pytest.mark.parametrize("ending", ["csv", "table"])
def test_a_full_disk_is_one_sentence(ending):
    command = [sys.executable, "-m", "dualpipe_engine.cli", "plan", *PAPER, "--format", ending]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "No space left" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["export", pytest.param("convert", marks=pytest.mark.all)])
def test_what_deepspeed_logs_is_not_in_the_output(tmp_path, command):
    """It names the accelerator that it has found where no variable does."""
    line = [sys.executable, "-m", "dualpipe_engine.cli", command, "--checkpoint", "none", "--out", "out"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("DS_")}
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: none" in done.stderr


def test_whole_jobs_are_estimated_without_torch():
    result = run("compare", "--model", "deepseek-v3", "--gpus", "2048", "--hardware", "h800")
    assert result.returncode == 0, result.stderr
    assert "published, with DualPipe: 180,000 GPU-hours" in result.stdout and "fp8 efficiency" in result.stdout
    assert "step (s)" in result.stdout


def test_whole_jobs_as_json(capsys):
    data = json.loads(
        output(capsys, "compare", "--model", "mixtral-8x7b", "--gpus", "16", "--ranks", "4", "--micro-batches", "8",
               "--sequence-length", "1024", "--format", "json")
    )  # fmt: skip
    assert [row["schedule"] for row in data["schedules"]] == list(SCHEDULES)
    assert sum(row["best"] for row in data["schedules"]) == 1


def test_whole_jobs_of_a_folder_with_experts_shared(tmp_path, capsys):
    """One row for each expert of a token, each way in bf16, is more than one for each rank of them."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_experts": 8, "vocab_size": 500}
    sizes |= {"model_type": "qwen3_moe", "num_experts_per_tok": 4, "moe_intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    base = ["compare", "--model", str(tmp_path), "--gpus", "8", "--ranks", "2", "--micro-batches", "4"]
    steps = []
    for more in (["--expert-parallel", "1"], ["--no-fp8"], ["--no-fp8", "--all-to-all"]):
        data = json.loads(output(capsys, *base, *more, "--format", "json"))
        assert data["model"]["name"] == tmp_path.name
        steps.append({row["schedule"]: row["step"] for row in data["schedules"]}["1f1b"])
    assert steps[0] < steps[1] < steps[2]
    assert main([*base, "--expert-parallel", "3"]) == 2
    assert "choose --expert-parallel" in capsys.readouterr().err
    assert main([*base, "--expert-parallel", "1", "--all-to-all"]) == 2
    assert "no ranks share experts" in capsys.readouterr().err


def test_the_memory_ladder_of_a_job(tmp_path, capsys):
    """The chosen one does not fit as it is; its rungs are listed."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"vocab_size": 500}))
    base = ["compare", "--model", str(tmp_path), "--gpus", "2", "--ranks", "2", "--micro-batches", "2"]
    base += ["--stages-per-rank", "2", "--memory"]
    data = json.loads(output(capsys, *base, "2e9", "--format", "json"))
    first = next(row for row in data["schedules"] if row["chosen"])
    assert first["cheapest"] in data["rungs"] and first["cheapest"]["memory"] <= 2e9 < first["as_it_is"]["memory"]
    assert {row["schedule"] for row in data["schedules"]} == set(SCHEDULES)
    shown = output(capsys, *base, "2e9")
    assert "cheapest change that makes it fit" in shown and "every rung" in shown and data["reason"] in shown
    assert "nothing fits into 0.1 GB" in output(capsys, *base, "1e8")


def test_a_comparison_without_micro_batches_says_so(capsys):
    assert main(["compare", "--ranks", "4"]) == 2
    assert "--micro-batches" in capsys.readouterr().err


def test_memory(tmp_path, capsys):
    """2 bytes of weights, 4 of gradients, 12 of Adam with master weights a parameter; these 12 shared in dualpipe."""
    config = tmp_path / "ds.json"
    text = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}
    config.write_text(json.dumps(text | {"gradient_accumulation_steps": 8}))
    base = ["memory", "--config", str(config), "--ranks", "4", "--params-per-stage", "1e3", "--activation-bytes", "10"]
    assert main([*base, "--format", "json"]) == 0
    rows = {row["schedule"]: row["ranks"] for row in json.loads(capsys.readouterr().out)["schedules"]}
    wanted = {"weights": 4000, "gradients": 8000, "optimizer": 12000, "activations": 50, "total": 24050, "host": 0}
    assert all({**rank, "activations": 50, "total": 24050} == wanted for rank in rows["dualpipe"])
    assert rows["1f1b"][0] == {
        "weights": 2000,
        "gradients": 4000,
        "optimizer": 12000,
        "activations": 40,
        "total": 18040,
        "host": 0,
    }
    assert main(base) == 0
    assert "dualpipe" in capsys.readouterr().out
    config.write_text("{ # HJSON\n  gradient_accumulation_steps: 8\n}")
    for given in (str(config), base64.urlsafe_b64encode(config.read_bytes()).decode()):
        assert main(["memory", "--config", given, *base[3:]]) == 0
        assert "8 micro-batches" in capsys.readouterr().out
    config.write_text('{"zero_optimization": {"stage": 3}}')
    assert main([*base, "--micro-batches", "8"]) == 2
    assert "ZeRO 0, 1 or 2" in capsys.readouterr().err
