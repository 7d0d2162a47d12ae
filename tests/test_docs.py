"""The guides: their code runs, their examples print what they show, their links lead somewhere."""

from __future__ import annotations

import importlib
import re
import sys
import types
from pathlib import Path

import pytest

from dualpipe_engine.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_named_files_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`((?:schedule|viz|comm|faults|runtime|engine|compat|profiling)/[\w/]+\.py)", text):
        assert (ROOT / "dualpipe_engine" / name).exists(), name


def sections():
    """docs/extending.md by heading."""
    text = (ROOT / "docs" / "extending.md").read_text()
    return dict(part.split("\n", 1) for part in text.split("\n## ")[1:])


def blocks(heading):
    return re.findall(r"```python\n(.*?)```", sections()[heading], re.S)


def module(name, code):
    """Code of a page as a new module of the package."""
    made = types.ModuleType(name)
    made.__package__ = name.rpartition(".")[0]
    exec(code, vars(made))
    return made


def test_extending_names_what_there_is():
    """Files, and names in them."""
    text = (ROOT / "docs" / "extending.md").read_text()
    example = {"dualpipe_engine/schedule/orders/gpipe.py", "tests/schedule/orders/test_gpipe.py"}
    names = set(re.findall(r"`((?:dualpipe_engine|tests)/[\w/]+\.py)`", text))
    assert example < names
    for name in names - example:
        assert (ROOT / name).exists(), name
    found = re.findall(r"`(\w+)`,? in\s`([\w/]+\.py)`", text)
    assert len(found) > 12
    for what, name in found:
        assert re.search(rf"\b{what}\b", (ROOT / name).read_text()), f"{what} in {name}"


def test_adding_a_schedule(monkeypatch):
    """The file, the line and the test that the page shows are all that GPipe needs."""
    from dualpipe_engine.schedule.orders import registry
    from dualpipe_engine.schedule.search.compare import compare
    from dualpipe_engine.schedule.search.make_plan import make_plan

    code, line, test = blocks("A schedule")
    gpipe = module("dualpipe_engine.schedule.orders.gpipe", code)
    monkeypatch.setitem(sys.modules, gpipe.__name__, gpipe)
    known = eval(f"{{{line}}}", {**vars(registry), "gpipe": gpipe, "sys": sys})
    for name, schedule in known.items():
        monkeypatch.setitem(registry.KNOWN, name, schedule)
    monkeypatch.setattr(registry, "SCHEDULES", tuple(registry.KNOWN))
    monkeypatch.syspath_prepend(ROOT / "tests" / "schedule")
    tests = module("test_gpipe", test)
    for name in dir(tests):
        if name.startswith("test_"):
            getattr(tests, name)()
    for optimize in (False, True):
        assert make_plan("gpipe", 2, 9, optimize=optimize).num_ops == 36
    rows = {row.schedule: row for row in compare(2, 9)}
    assert rows["gpipe"].peak_activations == 9 and rows["gpipe"].feasible


def test_adding_a_transport(tmp_path):
    import torch

    code, test = blocks("A transport")
    made = module("dualpipe_engine.comm.folder", code)
    edges = importlib.import_module("dualpipe_engine.comm.p2p").Edges
    names = {"FolderTransport": made.FolderTransport, "Edges": edges, "torch": torch, "CPU": torch.device("cpu")}
    exec(test, names)
    names["test_a_message_arrives"](tmp_path)
    late = made.FolderTransport(tmp_path, 1).recv(torch.empty(1), 0, 0)
    with pytest.raises(Exception, match="receive from pipeline rank 0 failed"):
        late.wait(0.01)


def test_adding_a_model_family(monkeypatch):
    import torch
    from torch import nn

    from dualpipe_engine.adapters import get_model_adapter, registry

    class Tower(nn.Sequential):
        pass

    monkeypatch.setattr(registry, "_ADDED", dict(registry._ADDED))
    _, code = blocks("A model family")
    exec(code, {"Tower": Tower, "torch": torch})
    model = Tower(*(nn.Linear(6, 6) for _ in range(4)))
    assert len(get_model_adapter(model).partition(2)) == 2


def test_adding_a_key():
    from pydantic import Field, ValidationError

    from dualpipe_engine.engine.section import DualPipeConfig

    (code,) = blocks("A key of the JSON")
    names = {"DualPipeConfig": DualPipeConfig, "Field": Field}
    exec(f"class Longer(DualPipeConfig):\n{code}", names)
    assert names["Longer"](log_every=3).log_every == 3
    with pytest.raises(ValidationError):
        names["Longer"](log_every=0)


def test_adding_a_rule(monkeypatch):
    from dualpipe_engine.profiling import doctor
    from dualpipe_engine.profiling.breakdown import OTHER

    (code,) = blocks("A rule of the doctor")
    rule = {**vars(doctor)}
    exec(code, rule)
    monkeypatch.syspath_prepend(ROOT / "tests" / "profiling")
    profile = importlib.import_module("test_doctor").profile
    monkeypatch.setattr(doctor, "_CHECKS", [rule["_checkpointing"]])
    slow = {"rank0": {OTHER: 0.5}, "micros": 4, "optimize": False}
    found = [doctor.diagnose(profile(**slow, activation_checkpointing=on)) for on in (True, False)]
    assert [[each.name for each in findings] for findings in found] == [["checkpointing"], []]


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
