import json
import shlex
from pathlib import Path

import pytest

from dualpipe_engine.cli.main import main

DOCS = Path(__file__).parents[3] / "docs"
PAGE = "\n".join((DOCS / name).read_text() for name in ("comparison.md", "long_sequences.md"))
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("dualpipe compare --model")]


@pytest.mark.all
@pytest.mark.parametrize("command", COMMANDS)
def test_the_documented_rung_is_the_one_that_the_command_chooses(command, capsys):
    assert main([*shlex.split(command)[1:], "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reason"] in PAGE.replace("\n> ", " "), found["reason"]


def test_four_jobs_are_documented():
    models = [command.split()[3] for command in COMMANDS]
    assert models == ["deepseek-v3", "mixtral-8x22b", "llama-3-70b", "llama-3-70b"]
