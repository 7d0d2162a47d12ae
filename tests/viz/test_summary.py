"""Tables: their numbers, their notes, and how long plans are shortened."""

import io

import pytest
from rich.console import Console

from dualpipe_engine.schedule.search.compare import compare, fastest
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timeline import Span, Timeline
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import peak_activations, simulate
from dualpipe_engine.viz.summary import comparison_table, plan_table, schedule_table


def printed(table, width=160):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def cells(text):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_every_op_of_a_short_plan_is_there():
    plan = make_plan("dualpipe", 4, 8)
    text = printed(plan_table(plan), 400)
    assert cells(text) == [[str(rank), " ".join(map(str, program))] for rank, program in enumerate(plan.programs)]
    assert "Shortened" not in text


def test_long_plans_are_shortened_with_a_note():
    plan = make_plan("1f1b", 40, 300)
    rows = dict(row for row in cells(printed(plan_table(plan), 2000)))
    assert list(rows) == [*map(str, range(8)), "...", *map(str, range(32, 40))]
    assert rows["..."] == "24 more ranks"
    assert "540 more ops" in rows["0"]
    assert rows["0"].startswith("0F0 0F1") and rows["39"].endswith("39F299 39B299")
    assert "24,000 ops" in printed(plan_table(plan))


def test_schedule_table_of_a_simulated_plan():
    plan = make_plan("1f1b", 2, 2)
    timeline = simulate(plan, CostModel())
    rows = cells(printed(schedule_table(timeline, peak_activations(plan), unit="")))
    assert rows == [["0", "6", "3", "33.3%", "2"], ["1", "6", "3", "33.3%", "1"]]


def test_schedule_table_shows_simulated_beside_measured():
    plan = make_plan("1f1b", 2, 2)
    simulated = simulate(plan, CostModel())
    measured = Timeline(2, [Span(s.rank, s.op, 10 + s.start / 10, 10 + s.end / 10) for s in simulated.spans[:-1]])
    text = printed(schedule_table(measured, simulated=simulated, title="last batch"))
    assert "last batch" in text and "busy [s]" in text and "simulated share" in text
    assert [row[3:] for row in cells(text)] == [["33.3%", "33.3%"], ["55.6%", "33.3%"]]


@pytest.mark.parametrize("ranks", [7, 8])
def test_comparison_marks_the_fastest_and_says_why_not(ranks):
    rows = compare(ranks, 16, CostModel(fb=2.25), optimize=False)
    text = printed(comparison_table(rows, {row.name: 1.5 for row in rows}, "side by side"))
    table = {row[0].removeprefix("> "): row for row in cells(text)}
    best = min((row for row in rows if row.feasible), key=lambda row: row.makespan)
    assert [name for name, row in table.items() if row[0].startswith(">")] == [best.name]
    assert float(table[best.name][1]) == pytest.approx(best.makespan, rel=1e-4)
    assert table["1f1b"][2] == "1.5" and table["dualpipe"][5] == "2x" and table["dualpipev"][5] == "1x"
    assert ("needs an even number" in " ".join(text.split())) == (ranks == 7)
    assert (table["dualpipe"][1:5] == ["-"] * 4) == (ranks == 7)


def test_nothing_is_fastest_where_nothing_runs():
    rows = compare(4, 8, activation_cap=0.0)
    assert not any(row.feasible for row in rows) and fastest(rows) is None
    assert ">" not in "".join(row[0] for row in cells(printed(comparison_table(rows, {}))))
