"""The page of a run: what it shows is what was planned and measured, and it opens alone."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from simulated_profile import HEALTHY, profile

from dualpipe_engine.cli import main
from dualpipe_engine.errors import MissingExtraError, ProfileError
from dualpipe_engine.page import figures
from dualpipe_engine.page.html import page, save_page
from dualpipe_engine.page.run import PROFILE, read_run
from dualpipe_engine.page.what_if import what_if
from dualpipe_engine.profiling.expert_load import LayerLoad, LoadReport
from dualpipe_engine.profiling.profile import KEY
from dualpipe_engine.schedule.search.make_plan import make_plan
from dualpipe_engine.schedule.timing.simulate import held_over_time, peak_activations, simulate
from dualpipe_engine.viz.cells import cells_of
from dualpipe_engine.viz.chrome import to_chrome


def folder_of(tmp_path, case, slower=1.0):
    """A folder as a run leaves it; its ops took `slower` times what the profile says."""
    timeline = case.simulated()
    spans = [span._replace(start=span.start * slower, end=span.end * slower) for span in timeline.spans]
    trace = to_chrome(type(timeline)(timeline.num_ranks, spans))
    (tmp_path / PROFILE).write_text(json.dumps(trace | {KEY: case.to_json()}))
    return tmp_path


def test_planned_and_measured_are_drawn_as_they_are(tmp_path):
    case = profile("zbv", micros=8, optimize=False)
    run = read_run(folder_of(tmp_path, case, slower=1.5))
    figure = figures.schedules({"planned": case.simulated(), "measured": run.measured})
    for axis, timeline in (("x", case.simulated()), ("x2", run.measured)):
        bars = [bar for bar in figure.data if bar.xaxis == axis]
        drawn = {
            (rank, round(start, 3), round(length, 3), text)
            for bar in bars
            for rank, start, length, text in zip(bar.y, bar.base, bar.x, bar.text, strict=True)
        }
        cells = [cell for span in timeline.spans for cell in cells_of(span)]
        wanted = {(c.rank, round(c.start * 1e3, 3), round((c.end - c.start) * 1e3, 3), str(c.micro)) for c in cells}
        assert drawn == wanted and len(cells) == sum(len(bar.x) for bar in bars)
    hovers = {text for bar in figure.data for text in bar.hovertext}
    assert any(text.startswith("<b>3F2</b> on rank 3<br>") for text in hovers)


def test_large_plans_are_drawn_in_columns():
    timeline = simulate(make_plan("dualpipe", 8, 800), HEALTHY)
    (picture,) = figures.schedules({"planned": timeline}).data
    assert picture.type == "heatmap" and len(picture.z) == 8
    assert all(len(row) == len(picture.x) == figures.COLUMNS for row in picture.z)
    busy = [sum(number > 0 for number in row) / figures.COLUMNS for row in picture.z]
    assert busy == pytest.approx([each / timeline.makespan for each in timeline.busy()], abs=0.02)


@pytest.mark.parametrize("schedule", ["dualpipe", "zbv", "zb1p", "vmin"])
def test_activations_held_over_time_have_the_known_peak(schedule):
    plan = make_plan(schedule, 4, 12)
    held = held_over_time(simulate(plan, HEALTHY))
    assert [max(count for _, count in points) for points in held] == peak_activations(plan)
    assert all(points[-1][1] == 0 for points in held)


def test_what_if_knows_every_schedule_and_tighter_caps():
    case = profile("1f1b", micros=16)
    rows = [row for row in what_if(case) if row.feasible]
    own = {row.schedule: row for row in rows if row.cap is None}
    assert own["1f1b"].makespan == pytest.approx(case.makespan) and own["dualpipe"].makespan < own["1f1b"].makespan
    capped = [row for row in rows if row.schedule == "zbv" and row.cap is not None]
    assert capped and all(row.peak_activations < own["zbv"].peak_activations for row in capped)


@pytest.mark.parametrize(("size", "micros"), [(4, 10), pytest.param(8, 64, marks=pytest.mark.all)])
def test_a_page_opens_alone_and_is_small(tmp_path, size, micros):
    case = profile("dualpipe", micros, optimize=False, size=size)
    run = read_run(folder_of(tmp_path, case))
    save_page(tmp_path / "report.html", run)
    text = (tmp_path / "report.html").read_text()
    assert len(text.encode()) < 8e6
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, count=1, flags=re.DOTALL)  # without plotly's own script
    assert len(own) < len(text) / 2 and not re.search(r"""(src|href)=["']?(https?:)?//""", own)
    for title in ("Schedule", "What costs most", "Where the step goes", "Memory over the step", "What if", "The job"):
        assert f"<h2>{title}</h2>" in own
    ids = re.findall(r'\bid="([^"]+)"', own)
    assert len(ids) == len(set(ids))


def test_names_of_users_are_text(tmp_path):
    case = profile("1f1b", micros=4, note="</pre><script>alert(1)</script>")
    assert "<script>alert(1)" not in page(read_run(folder_of(tmp_path, case)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "metrics.jsonl",
            '{"step": 0, "loss": 9}\n{"step": 1, "loss": 3, "lr": 0.5}\n{"step": 0, "loss": 4, "lr": 1}\n',
        ),
        (
            "checkpoint-2/trainer_state.json",
            '{"log_history": [{"step": 0, "loss": 4, "learning_rate": 1}, {"step": 1, "loss": 3, "learning_rate": 0.5},'
            ' {"step": 1, "eval_loss": 3.5}]}',
        ),
        ("logs/version_0/metrics.csv", "epoch,lr,step,train_loss,val_loss\n0,1,0,4,\n0,0.5,1,3,\n0,,1,,3.5\n"),
        ("version_0/metrics.csv", "epoch,lr-AdamW,step,train_loss,val_loss\n0,1,0,4,\n0,0.5,1,3,\n0,,1,,3.5\n"),
    ],
)
def test_losses_of_every_front_end_are_found(tmp_path, name, text):
    folder_of(tmp_path, profile("1f1b", micros=4))
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    lines = {line.name: (list(line.x), list(line.y)) for line in figures.curves(read_run(tmp_path).history).data}
    assert lines["loss"] == ([0, 1], [4, 3]) and lines["learning rate"] == ([0, 1], [1, 0.5])
    assert "evaluation loss" not in lines or lines["evaluation loss"] == ([1], [3.5])
    assert ("evaluation loss" in lines) == (name != "metrics.jsonl")


def test_what_cannot_be_shown_is_one_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(ProfileError, match=r"there is no dualpipe_profile\.json; call enable_profiling"):
        read_run(tmp_path)
    folder_of(tmp_path, profile("1f1b", micros=4))
    wrong = {"metrics.jsonl": "{", "trainer_state.json": "[]", "ds_config.json": "[]", "metrics.csv": "9" * 200_000}
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
        assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
        assert name in capsys.readouterr().err
        (tmp_path / name).unlink()
    (tmp_path / "ds_config.json").write_text("# HJSON\ntrain_batch_size: 4\n")
    assert read_run(tmp_path).config == {"train_batch_size": 4}
    assert main(["report", str(tmp_path / PROFILE), "--out", str(tmp_path / "nowhere" / "x.html")]) == 2
    assert "No such file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match="needs plotly"):
        page(read_run(tmp_path))


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.all
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("scheme", [0, 1])
def test_a_browser_shows_it_without_an_error(tmp_path, scheme):
    """`scheme`: dark, light. Every figure has been drawn, and nothing offers to send it away."""
    folder = folder_of(tmp_path, profile(micros=64, size=8))
    assert main(["report", str(folder), "--out", str(tmp_path / "x.html")]) == 0
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    command += [f"--user-data-dir={tmp_path / 'user'}", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom", f"file://{tmp_path / 'x.html'}"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in found.stderr
    assert found.stdout.count('class="main-svg"') >= found.stdout.count("Plotly.newPlot") >= 5
    buttons = set(re.findall('data-title="([^"]+)"', found.stdout))
    assert "Download plot as a PNG" in buttons and not any("hare" in each or "loud" in each for each in buttons)


def test_loads_of_experts_are_shown_with_what_the_log_has_of_them(tmp_path):
    load = LoadReport(2, (LayerLoad("1", 0, (3, 1, 0, 0), 2, 0.5), LayerLoad("4", 3, (1, 1, 1, 1), 2, 0.5)))
    folder = folder_of(tmp_path, profile("1f1b", micros=4, expert_load=load.to_json()))
    rows = [{"step": step, "loss": 1.0, **load.values()} for step in (0, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = read_run(folder)
    text = page(run)
    assert "<h2>Expert load</h2>" in text
    assert '<tr class="now"><td>1</td><td>3.00</td><td>0.00%</td><td>2.00</td><td>2</td></tr>' in text
    assert "expert_load" not in text[text.index('<section id="job">') :]
    (picture,) = figures.expert_rows(load).data
    assert [list(row) for row in picture.z] == [[3, 1, 0, 0], [1, 1, 1, 1]]
    lines = {line.name: list(line.y) for line in figures.unevenness(run.history).data}
    assert lines == {"layer 1": [3, 3], "layer 4": [1, 1]} and figures.unevenness([{"step": 0}]) is None
    assert "<h2>Expert load</h2>" not in page(read_run(folder_of(tmp_path, profile("1f1b", micros=4))))
