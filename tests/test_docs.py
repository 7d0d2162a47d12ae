"""The guides: their code runs, their examples print what they show, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dualpipe_engine.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "examples").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_named_files_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`((?:schedule|viz|comm|runtime|engine)/\w+\.py)", text):
        assert (ROOT / "dualpipe_engine" / name).exists(), name


def test_a_schedule_of_your_own(tmp_path, capsys):
    text = (ROOT / "docs" / "schedules.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.S)), {})
    first, better = map(float, capsys.readouterr().out.split())
    assert better < first
    path = tmp_path / "mine.csv"
    path.write_text(re.search(r"```\n(0F0.*?)```", text, re.S).group(1))
    assert main(["plan", "--schedule", str(path)]) == 0


def test_the_verifier_prints_what_its_page_shows(tmp_path, capsys):
    shown = re.search(r"```\n(rank 1.*?)\n```", (ROOT / "docs" / "verifier.md").read_text(), re.S).group(1)
    path = tmp_path / "bad.csv"
    path.write_text("0F0,0F1,0B0,0B1\n1B0,1F0,1F1,1B1\n")
    assert main(["plan", "--schedule", str(path)]) == 2
    assert capsys.readouterr().err.strip() == f"error: {shown}"
