"""SVG and PNG: valid files, text as text, every cell once, reduced detail, clear errors."""

import struct
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest

from dualpipe_engine.errors import ConfigError, MissingExtraError
from dualpipe_engine.schedule.op import Op, atoms
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timeline import Span, Timeline
from dualpipe_engine.schedule.timing.costs import CostModel
from dualpipe_engine.schedule.timing.simulate import simulate
from dualpipe_engine.viz.figure import save_figure


def simulated(name, ranks, micro):
    plan = make_plan(name, ranks, micro)
    return simulate(plan, CostModel(fb=3.0).for_placement(plan.placement))


def texts_of(path):
    return [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_svg_numbers_every_cell_with_its_micro_batch(tmp_path, name):
    timeline = simulated(name, 4, 8)
    path = tmp_path / "schedule.svg"
    save_figure(path, timeline, "a title & more")
    texts = texts_of(path)
    cells = Counter(str(part.micro) for span in timeline.spans for part in atoms(span.op))
    found = Counter(text for text in texts if text.isdigit())
    assert all(found[number] - count in (0, 1) for number, count in cells.items())  # one more: a tick of the time axis
    assert {"a title & more", "Device 0", "Device 3", "Forward", "time"} <= set(texts)
    assert ("Overlapped forward & backward (shared border)" in texts) == (name != "1f1b")
    assert any("reverse direction" in text for text in texts) == (name == "dualpipe")
    assert path.stat().st_size < 20_000 + 300 * sum(cells.values())


def test_the_same_timeline_makes_the_same_svg(tmp_path):
    for name in ("a.svg", "b.svg"):
        save_figure(tmp_path / name, simulated("zbv", 2, 3))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_measured_timelines_with_transfers_and_tail(tmp_path):
    spans = [
        Span(0, Op("F", 0, 0), 7.0, 7.031),
        Span(0, Op("SEND_F", 0, 0), 7.031, 7.06),
        Span(1, Op("REDUCE", 1, -1), 7.06, 7.08),
        Span(1, Op("STEP", -1, -1), 7.08, 7.1),
    ]
    save_figure(tmp_path / "measured.svg", Timeline(2, spans), "measured", "s")
    texts = texts_of(tmp_path / "measured.svg")
    assert {"0", "R", "S", "Transfer", "Gradient reduction", "Optimizer step", "time [s]"} <= set(texts)


def test_wide_plans_are_drawn_at_reduced_detail(tmp_path):
    path = tmp_path / "wide.svg"
    save_figure(path, simulated("dualpipe", 8, 400))
    texts = texts_of(path)
    assert any("reduced detail" in text for text in texts)
    assert len(texts) < 50 and path.stat().st_size < 200_000


def test_png(tmp_path):
    path = tmp_path / "schedule.png"
    save_figure(path, simulated("dualpipe", 4, 8))
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 1000 < width < 4000 and 300 < height < 1000


@pytest.mark.parametrize("name", ["schedule.pdf", "schedule", "nowhere/schedule.svg"])
def test_paths_that_cannot_be_written(tmp_path, name):
    with pytest.raises(ConfigError, match=name):
        save_figure(tmp_path / name, simulated("1f1b", 2, 2))


def test_missing_matplotlib_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="pip install matplotlib"):
        save_figure(tmp_path / "schedule.svg", simulated("1f1b", 2, 2))
