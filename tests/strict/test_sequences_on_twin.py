"""Replicas that share sequences on the strict twin of NCCL."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import strict_runs

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
import test_mtp_parts as later
import test_parts as parts
import test_sequence_parallel as sequences

CASES = [*sequences.CASES, {"model": sequences.GROUPED, "schedule": "interleaved", "size": 2}]
rules = pytest.mark.parametrize(("eager", "in_flight"), [(True, 8), (False, 3)], ids=["eager", "lazy"])


@pytest.mark.all
@rules
def test_gradients(on_twin, eager, in_flight):
    """On neighbours in line, in a circle, in both directions and on a V."""
    found = on_twin(4, strict_runs.sequence_gradients, eager, in_flight, cases=CASES)
    for number, case in enumerate(CASES):
        sequences.check([rank[number] for rank in found], case)


@pytest.mark.all
@rules
def test_later_tokens(on_twin, eager, in_flight):
    found = on_twin(4, strict_runs.sequence_gradients, eager, in_flight, cases=later.CASES)
    for number, case in enumerate(later.CASES):
        later.check([rank[number] for rank in found], case)


@pytest.mark.all
@rules
def test_auto(on_twin, tmp_path, eager, in_flight):
    """Ranks that share sequences enter the exchanges of a measurement in one order."""
    found = on_twin(4, strict_runs.sequence_auto, eager, in_flight, path=tmp_path / "costs.json", **sequences.GROUPED)
    sequences.check_auto(found, sequences.GROUPED)


@pytest.mark.all
@rules
def test_models_of_transformers(on_twin, eager, in_flight):
    found = on_twin(4, strict_runs.part_gradients, eager, in_flight, cases=parts.CASES)
    for number, case in enumerate(parts.CASES):
        parts.check([rank[number] for rank in found], case)
