"""Terminal drawings: the letters of known schedules, and any width."""

import io
import sys
import time

import pytest
from rich.console import Console

from dualpipe_engine.schedule.op import Op
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timeline import Span, Timeline
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate
from dualpipe_engine.viz.terminal import draw_terminal, spinning


def drawn(timeline, width, unit="", **console):
    out = io.StringIO()
    draw_terminal(timeline, Console(file=out, width=width, **console), "title", unit)
    return out.getvalue().splitlines()


def test_1f1b_on_two_ranks_letter_by_letter():
    timeline = simulate(make_plan("1f1b", 2, 2), CostModel())
    assert drawn(timeline, 42)[:5] == [
        "title, makespan 9, largest bubble 3 (33%)",
        "Device 0 F0-F1-      B0----   B1----",
        "Device 1    F0-B0----F1-B1----      ",
        "         +--------------+------------",
        "         0              5",
    ]


def test_dualpipe_of_the_paper_letter_by_letter():
    timeline = simulate(make_plan("dualpipe", 8, 20), CostModel(fb=3.0))
    lines = drawn(timeline, 80)
    assert lines[1] == "Device 0 FFFFFFFfiwfiwfiwfF&b   f&BF&bf&BF&bf&Bb- f&Bb- f&Bb- f&Bb-IWIWIWIW"
    assert lines[4] == "Device 3    FfFfFfFfFb1f&BF&bf&BF&bf&BF&bf&BF&bf&BF&bf&Bb-B- b-B- iI iIwWwW"
    for rank in range(4):  # the other half is the mirror image: same letters, other case and direction
        mirrored = lines[1 + rank].removeprefix(f"Device {rank}").swapcase()
        expected = "".join(c for c in lines[8 - rank].removeprefix(f"Device {7 - rank}") if not c.isdigit())
        assert "".join(c for c in mirrored if not c.isdigit()) == expected


@pytest.mark.parametrize("width", [20, 33, 60, 80, 133, 300])
@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev", "zbv"])
def test_no_line_is_wider_than_the_console(name, width):
    timeline = simulate(make_plan(name, 4, 9), CostModel().for_placement(make_plan(name, 4, 9).placement))
    assert all(len(line) <= width for line in drawn(timeline, width))


def test_irregular_times_tail_ops_and_transfers():
    spans = [
        Span(0, Op("F", 0, 0), 5.0, 5.031),
        Span(0, Op("SEND_F", 0, 0), 5.031, 5.06),
        Span(0, Op("REDUCE", 0, -1), 5.06, 5.08),
        Span(0, Op("STEP", -1, -1), 5.08, 5.1),
    ]
    lines = drawn(Timeline(1, spans), 60, unit="s")
    assert lines[0] == "title, makespan 0.1 s, largest bubble 0.069 s (69%)"
    row = lines[1].removeprefix("Device 0 ")
    assert row.startswith("F0-") and set(row) == set("F0 RS-")
    assert [row.count(letter) for letter in "FRS"] == [1, 1, 1]
    assert abs(row.index("R") - 0.6 * len(row)) <= 1
    assert any("optimizer step" in line for line in lines)


def test_colours_are_used_where_the_terminal_has_them():
    timeline = simulate(make_plan("1f1b", 2, 2), CostModel())
    coloured = "\n".join(drawn(timeline, 40, force_terminal=True, color_system="truecolor"))
    assert "\x1b[" in coloured and "F0-" not in coloured
    assert "\x1b[" not in "\n".join(drawn(timeline, 40))


def test_thousands_of_ops_stay_one_line_a_rank():
    timeline = simulate(make_plan("dualpipe", 8, 400), CostModel(fb=3.0))
    lines = drawn(timeline, 80)
    assert len(lines) < 20
    assert lines[1].count("&") > 50


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_long_work_shows_that_it_goes_on(monkeypatch):
    for stream, shown in ((_Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with spinning("looking for an order"):
            time.sleep(0.2)
        assert ("looking for an order" in stream.getvalue()) == shown
