"""Every public name of DeepSpeed's engines works, is as in stock, or is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import method_runs
import pytest
from deepspeed.runtime.pipe.engine import PipelineEngine

from dualpipe_engine.engine.methods import REFUSED, REFUSED_ATTRIBUTES, WORKS, named

ROOT = Path(__file__).parents[2]
tables = method_runs.load_tables()


def test_every_name_has_one_row():
    assert set(tables.engine_names()) == named()


def test_a_new_name_is_found(monkeypatch):
    monkeypatch.setattr(PipelineEngine, "planted", lambda self, what: what, raising=False)
    assert set(tables.engine_names()) - named() == {"planted"}


def test_the_page_is_what_the_rows_say():
    assert (ROOT / "docs" / "engine.md").read_text() == tables.engine_page(), "run `python docs/tables.py`"


@pytest.mark.parametrize("test", WORKS)
def test_rows_name_tests_that_exist(test):
    path, name = test.split("::")
    assert name in {getattr(each, "name", None) for each in ast.parse((ROOT / "tests" / path).read_text()).body}


def test_answers_are_those_of_stock(ranks):
    names = WORKS["engine/test_methods.py::test_answers_are_those_of_stock"].split()
    names = [name for name in names if name not in ("get_batch_info", "get_sequence_parallel_group")]
    stock, ours = (ranks.run(2, method_runs.answers, schedule=schedule, names=names) for schedule in (None, "dualpipe"))
    for mine, theirs in zip(ours, stock, strict=True):
        assert len(mine) > 100
        assert {name: text for name, text in mine.items() if text != theirs[name]} == {}


def test_refused(ranks):
    said, has = ranks.run(2, method_runs.refused)[0]
    assert said.keys() == {*REFUSED, *REFUSED_ATTRIBUTES} and not has
    for name, text in said.items():
        assert text.startswith(f"{name}() cannot work" if name in REFUSED else f"engine.{name} belongs to")


def test_sizes_and_data_that_cannot_be_are_refused(ranks):
    for said, same in ranks.run(2, method_runs.sizes):
        assert len(said) == 8 and same, said
        assert "data_iter must be an iterator, and a list is none: pass iter(...)" in said[7]
        assert sum("must be a whole number from 1" in text for text in said) == 5
        assert "must be a multiple of" in said[4] and "Endless has no numbers: give train_batch an iterator" in said[6]


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_the_client_sees_its_own_pipeline(ranks, schedule):
    stock, ours = (ranks.run(2, method_runs.seen, schedule=each) for each in (None, schedule))
    assert len({each.pop("loss") for each in ours}) == 1
    for rank, (mine, theirs) in enumerate(zip(ours, stock, strict=True)):
        both = schedule == "dualpipe" or rank == 0
        assert mine.pop("reads") == (both, both) and mine.pop("iterates") == both
        del theirs["reads"]
        assert mine == theirs


def test_a_client_with_its_own_engine(ranks):
    (plain, own), batches, name, refusal = ranks.run(2, method_runs.own_engine)[0]
    assert plain == own and (batches, name) == (1, "Counting")
    assert refusal.startswith('Counting would ignore "schedule": "dualpipe"') and "engine_class=Counting" in refusal
