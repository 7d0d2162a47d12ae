"""Nothing grows over 1,000 steps; the run itself takes minutes, so only --all has it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parent.parent / "examples" / "bench"


@pytest.mark.parametrize(
    ("last", "good"),
    [((1000, 403.9, 70), True), ((1000, 404.1, 70), False), ((1000, 400.0, 71), False)],
    ids=["flat", "memory", "descriptor"],
)
def test_growth_of_one_rank_after_the_warm_up_is_found(monkeypatch, last, good):
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setitem(sys.modules, "ranks", SimpleNamespace(run_ranks=None))  # the tests' own `ranks` has another
    monkeypatch.delitem(sys.modules, "soak", raising=False)
    soak = importlib.import_module("soak")
    other = [(50, 300.0, 60), (100, 400.0, 70), (1000, 400.0, 70)]
    assert soak.flat([other, [(100, 400.0, 70), last]]) is good


@pytest.mark.all
def test_memory_and_descriptors_of_every_rank_stay_flat():
    run = subprocess.run([sys.executable, BENCH / "soak.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
