"""The documentation site builds without a warning and holds every module and every schedule."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dualpipe_engine.schedule.orders.registry import SCHEDULES

ROOT = Path(__file__).resolve().parents[1]


def hook(name):
    """A file of docs/_site."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "_site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.all
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason='needs pip install "dualpipe_engine[docs]"')
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-4000:]
    modules = {
        path.relative_to(ROOT).with_suffix("")
        for package in ("dualpipe_engine", "integrations")
        for path in (ROOT / package).rglob("*.py")
    }
    for module in modules:
        page = tmp_path / "api" / (module.parent if module.name == "__init__" else module) / "index.html"
        assert page.exists(), module
    assert (
        "DualPipeTrainer" in (tmp_path / "api" / "integrations" / "transformers" / "trainer" / "index.html").read_text()
    )
    gallery = (tmp_path / "gallery" / "index.html").read_text()
    for schedule in SCHEDULES:
        assert f"{schedule}_4x8.svg" in gallery and (tmp_path / "pictures" / f"{schedule}_4x8.svg").exists()
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / page.stem / "index.html").exists(), page.name
    home = (tmp_path / "index.html").read_text()
    for target in re.findall(r'<(?:img|a)[^>]* (?:src|href)="([^"#:]+)["#]', home):
        place = tmp_path / target
        assert place.exists() or (place / "index.html").exists(), target


@pytest.mark.parametrize(
    ("source", "uri", "text", "expected"),
    [
        ("README.md", "index.md", "[a](docs/migrating.md#what)", "[a](migrating.md#what)"),
        ("README.md", "index.md", "![d](examples/dualpipe_8x20.svg)", "![d](pictures/dualpipe_8x20.svg)"),
        ("README.md", "index.md", "[`x.py`](tests/x.py) and [b](https://a.org/x)", "`x.py` and [b](https://a.org/x)"),
        ("docs/measured/README.md", "measured/README.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("docs/a.md", "a.md", "[b](b.md) [c](measured/README.md)", "[b](b.md) [c](measured/README.md)"),
    ],
)
def test_links_between_repository_and_site(source, uri, text, expected):
    pytest.importorskip("mkdocs", reason='needs pip install "dualpipe_engine[docs]"')
    assert hook("beside").relink(text, source, uri) == expected


def test_a_measured_report_becomes_a_page():
    pytest.importorskip("mkdocs", reason='needs pip install "dualpipe_engine[docs]"')
    checks = [
        {"check": 1, "name": "a wait", "result": "passed", "facts": {"host_ms": 0.2}, "seconds": 3.14},
        {"check": 2, "name": "a link", "result": "not done in 60 s", "output": "...", "seconds": 60.0},
    ]
    report = {"hardware": "A GPU", "torch": "2.13.0", "nccl": "", "checks": checks}
    page = hook("measured").page(json.loads(json.dumps(report)), "a-gpu.json")
    assert page.startswith("# A GPU\n\n- torch: 2.13.0\n\n") and "nccl" not in page
    assert "| 1 | a wait | passed | 3.1 |\n| 2 | a link | not done in 60 s | 60.0 |" in page
    assert page.count("### ") == 1 and "- host_ms: `0.2`" in page
