"""Command lines and plan files drawn by chance: a result or one sentence, never a traceback, and soon."""

from __future__ import annotations

import contextlib
import io
import random
import signal
from pathlib import Path

import pytest

from dualpipe_engine.cli.main import main
from dualpipe_engine.errors import DualPipeError
from dualpipe_engine.schedule.orders.registry import SCHEDULES
from dualpipe_engine.schedule.passes.verify import verify
from dualpipe_engine.schedule.plan import Plan

SOON_S = 60  #: after which a call counts as one that does not end
NUMBERS = [
    *"0123468x",
    "20",
    "-1",
    "1.5",
    "1e308",
    "1e-320",
    "inf",
    "nan",
    "1" + "0" * 20,
    "",
    "٣",
    "0x10",
    "1_0",
    " 4",
]
NUMBERS += ["1e400", "9" * 5000]
NAMES = [
    "plan.json",
    "plan.csv",
    "\udcff",
    "a\0b",
    "/",
    "",
    "bad.csv",
    "bad.json",
    "deep.json",
    "many.csv",
    "none.json",
]
PLAN = [
    "--schedule",
    "--ranks",
    "--micro-batches",
    "--costs",
    "--comm",
    "--optimize",
    "--activation-cap",
    "--offload-activations",
    "--copy",
]
COMMANDS = {
    "plan": [*PLAN, "--format", "--with-comm"],
    "draw": [*PLAN, "--out"],
    "compare": [*PLAN[1:-2], "--layer-costs", "--model", "--gpus", "--hardware", "--format"],
    "memory": ["--config", "--ranks", "--params-per-stage", "--activation-bytes"],
    "doctor": [],
    "export": ["--checkpoint", "--out"],
    "convert": ["--checkpoint", "--out"],
}
OTHERS = {
    "--format": ["json", "csv", "table", "x"],
    "--out": ["o.svg", "o.xyz", "/nonexistent/o.svg", "o.csv", "a\0b.svg", "\udcff.svg"],
    "--config": ["ds.json", *NAMES],
    "--checkpoint": NAMES,
    "--model": ["deepseek-v3", "gpt", "x", *NAMES],
    "--hardware": ["h800", "x", *NAMES],
    "--schedule": [*SCHEDULES, *SCHEDULES, "nope", *NAMES],
}


def number(chance):
    return chance.choice(NUMBERS if chance.random() < 0.5 else ["2", "4", "6", "8"])


def value(chance, flag):
    if flag == "--costs":
        return ",".join(number(chance) for _ in range(chance.choice([1, 3, 4, 4])))
    if flag == "--layer-costs":
        return chance.choice(["0.2,1x40,3", f"1x{number(chance)}", f"{number(chance)}x{number(chance)}", *NAMES])
    return chance.choice(OTHERS[flag]) if flag in OTHERS else number(chance)


def command_line(chance):
    command = chance.choice(list(COMMANDS))
    flags = COMMANDS[command]
    wanted = [flag for flag in flags[:3] if chance.random() < 0.8] + chance.sample(flags, min(len(flags), 2))
    words = [command]
    for flag in wanted:
        words += [flag] if flag in ("--optimize", "--with-comm") else [flag, value(chance, flag)]
    if command == "doctor" or chance.random() < 0.15:
        words.insert(1, chance.choice(NAMES))
    return words


def quiet(words):
    """Exit code and output."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        return main(words), out.getvalue()


@contextlib.contextmanager
def soon(what):
    def late(*_):
        raise AssertionError(f"no end of {what}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SOON_S)
    try:
        yield
    except (AssertionError, DualPipeError, SystemExit):
        raise
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__} of {what}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("plan.json", "plan.csv"):
        words = ["plan", "--schedule", "zbv", "--ranks", "4", "--micro-batches", "4", "--format", name.split(".")[1]]
        Path(name).write_text(quiet(words)[1])
    Path("ds.json").write_text('{"gradient_accumulation_steps": 8, "pipeline": {"schedule": "dualpipe"}}')
    Path("deep.json").write_text("[" * 100_000)
    Path("bad.json").write_text('{"programs": 3}')
    Path("bad.csv").write_text("a,b\n")
    Path("many.csv").write_text(Path("plan.csv").read_text().replace("F0.0", "F0.999999999", 1))
    return tmp_path


LONG = pytest.param(10_000, marks=pytest.mark.all)


@pytest.mark.parametrize("count", [100, LONG])
def test_any_command_line(files, count):
    chance = random.Random(count)
    for _ in range(count):
        words = command_line(chance)
        with soon([word[:40] for word in words]):
            try:
                code, _ = quiet(words)
            except SystemExit as left:  # of argparse
                code = left.code
            assert code in (0, 2), words


@pytest.mark.parametrize("count", [400, LONG])
def test_any_plan_file(files, count):
    """Plans that somebody has edited: characters replaced, repeated and left out."""
    chance = random.Random(count)
    texts = [
        (Path(name).read_text(), reader)
        for name, reader in (("plan.csv", Plan.from_csv), ("plan.json", Plan.from_json))
    ]
    for _ in range(count):
        text, reader = chance.choice(texts)
        for _ in range(chance.randrange(1, 4)):
            at, length = chance.randrange(len(text)), chance.randrange(4)
            put = chance.choice(["", "9" * chance.randrange(1, 6000), "F", "-", '"', ",", "[" * 2000, "\n", "\0", "٣"])
            text = text[:at] + put + text[at + length :]
        with soon(text[:200]):
            try:
                verify(reader(text))
            except DualPipeError as error:
                assert str(error)
