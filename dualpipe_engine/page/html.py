"""The HTML file: sections of text, tables and figures, light or dark as the reader's system is, light on paper."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError, ProfileError
from ..profiling.doctor import diagnose
from ..profiling.expert_load import LoadReport
from ..profiling.profile import EXPERT_LOAD
from ..schedule.aside import write_whole
from ..schedule.search.compare import Row, fastest
from ..schedule.search.job_costs import gib
from . import figures
from .run import Run
from .what_if import what_if

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_STYLE = """
:root { --ink: #1d2126; --soft: #5a626d; --ground: #ffffff; --line: #dfe3e8; --card: #f6f7f9; color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ae; --ground: #14171b; --line: #2f353d; --card: #1c2026 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 1240px; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { color: var(--soft); margin: .3rem 0 .8rem; max-width: 80ch }
nav a { color: inherit; margin-right: 1rem }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0 }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem }
.cards b { display: block; font-size: 1.15rem } .cards span { color: var(--soft); font-size: .85rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .scroll { overflow-x: auto }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } tr.now { font-weight: 600 }
tr.no td { color: var(--soft); white-space: normal }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; overflow-x: auto }
li { margin-bottom: .7rem } li small { color: var(--soft) }
@page { margin: 1cm }
@media print {
  :root { --ink: #000; --soft: #444; --ground: #fff; --line: #ccc; --card: #fff }
  nav, .modebar { display: none !important }
  body { padding: 0 } h2 { margin-top: 1rem } .scroll { overflow: visible }
  th, td { padding: .2rem .4rem; font-size: .8rem }
  .cards { gap: .4rem; margin: .3rem 0 } .cards div { padding: .3rem .6rem } .cards span { font-size: .7rem }
  h2, p { break-after: avoid } p, li, table, pre, .plotly-graph-div { break-inside: avoid }
}
"""

_SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function paint(isDark) {
  const ink = isDark ? '#e6e8eb' : '#1d2126', line = isDark ? '#2f353d' : '#dfe3e8';
  for (const plot of document.querySelectorAll('.plotly-graph-div')) {
    const change = {paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', 'font.color': ink,
      'modebar.bgcolor': 'rgba(0,0,0,0)', 'modebar.color': line, 'modebar.activecolor': ink};
    for (const axis of Object.keys(plot.layout).filter(key => /^[xy]axis/.test(key)))
      for (const part of ['gridcolor', 'zerolinecolor', 'linecolor']) change[axis + '.' + part] = line;
    Plotly.relayout(plot, change);
  }
}
addEventListener('load', () => paint(dark.matches));  // once the figures stand
dark.addEventListener('change', event => paint(event.matches));
addEventListener('beforeprint', () => paint(false));
addEventListener('afterprint', () => paint(dark.matches));
"""


def save_page(path: str | Path, run: Run) -> None:
    """Write the page of a run; it opens without a network.

    Raises:
        ProfileError: the file cannot be written.
        MissingExtraError: plotly is not installed.
    """
    text = page(run)
    try:
        write_whole(path, text)
    except (OSError, ValueError) as error:  # of a name that no file can have
        raise ProfileError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def page(run: Run) -> str:
    """The whole text of the page."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtraError("the page needs plotly: pip install 'dualpipe_engine[report]'") from None
    sections = list(_sections(run))
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{text}</section>' for key, title, text in sections)
    name = escape(run.name)
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body><h1>{name}</h1>{_cards(run)}<nav>{links}</nav>{body}<script>{_SCRIPT}</script></body></html>"
    )


def _sections(run: Run) -> Iterator[tuple[str, str, str]]:
    """Key, title and text of each section."""
    profile = run.profile
    planned = profile.simulated()
    both = {"planned": planned, "measured": run.measured}
    yield (
        "schedule",
        "Schedule",
        _say(
            "Planned: simulated with the measured costs, transfers for nothing. Measured: the step of median length. "
            "Drag to zoom both, double-click to go back; an op says its times when pointed at."
        )
        + _plot("schedules", figures.schedules(both)),
    )
    yield "findings", "What costs most", _findings(run)
    yield (
        "step",
        "Where the step goes",
        _say(f"Mean of {len(profile.steps)} steps. Exposed: a rank stood still for it; hidden: it ran beside an op.")
        + _plot("step", figures.where_time_goes(profile))
        + _plot("communication", figures.communication(profile)),
    )
    load = profile.expert_load
    if load is not None:
        yield "experts", "Expert load", _experts(load, run)
    yield (
        "memory",
        "Memory over the step",
        _say("Activations that each rank holds, from the start of a forward to the end of its weight gradient.")
        + _plot("memory", figures.memory(both))
        + _say("Most bytes held: " + ", ".join(f"{rank.name} {gib(rank.memory_bytes)}" for rank in profile.ranks)),
    )
    losses = figures.curves(run.history)
    if losses is not None:
        yield "loss", "Loss and learning rate", _plot("loss", losses)
    rows = what_if(profile)
    yield (
        "what-if",
        "What if",
        _say(
            "The measured costs, transfers for as long as they took, under every schedule, and under activation caps "
            "below its own where it takes them."
        )
        + _plot("what-if", figures.choices(rows, profile.plan.schedule))
        + _choices(rows, profile.plan.schedule),
    )
    facts = {name: value for name, value in profile.facts.items() if name != EXPERT_LOAD}
    yield "job", "The job", _json({**facts, **({"config": run.config} if run.config else {})})


def _cards(run: Run) -> str:
    profile = run.profile
    plan, simulated = profile.plan, profile.simulated()
    bubble = max(rank.bubble for rank in profile.ranks if rank.replica == 0)
    values = [
        (plan.schedule, f"{plan.placement.num_ranks} ranks, {plan.num_micro} micro-batches"),
        (_ms(profile.step), "a step"),
        (_ms(profile.makespan), f"first to last op; simulated {_ms(simulated.makespan)}"),
        (f"{bubble / profile.makespan:.0%}" if profile.makespan else "-", "largest bubble"),
    ]
    if run.history and "loss" in run.history[-1]:
        values.append((f"{run.history[-1]['loss']:.4g}", "last loss"))
    return (
        '<div class="cards">'
        + "".join(f"<div><b>{escape(b)}</b><span>{escape(s)}</span></div>" for b, s in values)
        + "</div>"
    )


def _findings(run: Run) -> str:
    found = diagnose(run.profile)
    if not found:
        return _say("Nothing stands out: no finding costs enough to act on.")
    lines = []
    for each in found:
        gain = "" if each.gain is None else f"; expected gain {_ms(each.gain)} a step"
        if each.gain is not None and each.gain < 0:
            gain = f"; gains memory, for {_ms(-each.gain)} a step"
        lines.append(
            f"<li><b>{escape(each.name)}</b>: {escape(each.fact)}<br>{escape(each.advice)} "
            f"<small>costs {_ms(each.cost)} a step{gain}</small></li>"
        )
    return f"<ol>{''.join(lines)}</ol>"


def _experts(load: LoadReport, run: Run) -> str:
    """Rows of each expert by the mean of its layer, the numbers of each layer, and what the log has of them."""
    heads = ("layer", "busiest expert, by the mean", "least used, of all rows", "busiest rank, by the mean", "ranks")
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for each in load.layers:
        mark = ' class="now"' if each is load.worst else ""
        cells = (
            escape(each.layer),
            f"{each.uneven:.2f}",
            f"{each.least:.2%}",
            f"{each.busiest_rank:.2f}",
            str(each.ranks),
        )
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    over_time = figures.unevenness(run.history)
    return (
        _say(f"Rows of each expert in step {load.step}, all micro-batches and replicas; no row is dropped.")
        + _plot("experts", figures.expert_rows(load))
        + f'<div class="scroll"><table>{"".join(lines)}</table></div>'
        + ("" if over_time is None else _plot("unevenness", over_time))
    )


def _choices(rows: Sequence[Row], current: str) -> str:
    first = fastest(rows)
    heads = ("schedule", "activation cap", "makespan", "bubble", "peak activations", "parameters")
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for row in sorted(rows, key=lambda row: row.makespan):
        name = (
            row.schedule + (" (fastest)" if row is first else "") + (" (this run)" if row.schedule == current else "")
        )
        if not row.feasible:
            lines.append(f'<tr class="no"><td>{escape(name)}</td><td colspan="5">{escape(row.reason)}</td></tr>')
            continue
        cells = (
            escape(name),
            "its own" if row.cap is None else str(row.cap),
            _ms(row.makespan),
            _ms(row.bubble),
            f"{row.peak_activations:g}",
            f"{row.parameter_copies}x",
        )
        mark = ' class="now"' if row.schedule == current and row.cap is None else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _plot(key: str, figure: Figure) -> str:
    figure.update_layout(template="none", margin={"l": 70, "r": 70, "t": 40, "b": 80})
    config = {"displaylogo": False, "responsive": True, "scrollZoom": True, "showSendToCloud": False}
    text: str = figure.to_html(config, full_html=False, include_plotlyjs=False, div_id=f"plot-{key}")
    return text


def _say(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _json(data: Mapping[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(data, indent=2, default=str))}</pre>"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
