"""Figures of the page (plotly): each is a value that plotly's script draws, with no colours of its own for text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..profiling.breakdown import CATEGORIES, COMMUNICATION, DATA_TIME, OPTIMIZER, OTHER, REDUCING, WAITING
from ..profiling.expert_load import PREFIX, UNEVEN, LoadReport
from ..profiling.profile import Profile
from ..schedule.op import COMPUTE, FB, B, F, I, W
from ..schedule.search.compare import Row
from ..schedule.timeline import Span, Timeline
from ..schedule.timing.simulate import held_over_time
from ..viz.cells import PALETTE, cells_of, columns, is_second, kinds_of, second_note

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Heatmap

MOST_BOXES = 12_000  #: of a drawing; above, each column of time shows what fills most of it
COLUMNS = 1200
_MS = 1e3
#: Pixels: below an axis, of a title above, and above and below all axes of a figure.
_TICKS_AND_TITLE, _TITLE, _AROUND = 56, 36, 120
_SHARES = {
    F: PALETTE[F][1],
    I: PALETTE[I][1],
    W: PALETTE[W][1],
    B: PALETTE[B][1],
    FB: "#b5651d",
    WAITING: "#d0d4db",
    COMMUNICATION: "#d1495b",
    REDUCING: PALETTE["REDUCE"][1],
    OPTIMIZER: PALETTE["STEP"][1],
    DATA_TIME: "#5c7c5a",
    OTHER: "#8d8f98",
}
_LABELS = {FB: "F&B", COMMUNICATION: "exposed communication", REDUCING: "exposed reduction"}


def schedules(drawings: Mapping[str, Timeline]) -> Figure:
    """Timelines below one another on one axis of time, so that zooming one zooms all.

    Args:
        drawings: title -> timeline in seconds, of the same ranks.
    """
    from plotly.subplots import make_subplots

    ranks = max(timeline.num_ranks for timeline in drawings.values())
    height = 170 + len(drawings) * min(900, 70 + 24 * ranks)
    figure = make_subplots(
        rows=len(drawings),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=_TITLE / (height - _AROUND),
        subplot_titles=list(drawings),
    )
    shown: set[str] = set()
    for row, timeline in enumerate(drawings.values(), 1):
        spans = [span for span in timeline.spans if span.op.kind in COMPUTE or span.op.kind in PALETTE]
        timeline = Timeline(ranks, spans)
        if sum(len(cells_of(span)) for span in spans) > MOST_BOXES:
            traces = [_reduced(timeline)]
        else:
            traces = _boxes(timeline, shown)
        for trace in traces:
            figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(
            row=row,
            col=1,
            autorange="reversed",
            tickvals=list(range(ranks)),
            ticktext=[f"rank {r}" for r in range(ranks)],
        )
    figure.update_xaxes(range=[0, max(timeline.makespan for timeline in drawings.values()) * _MS])
    figure.update_xaxes(title_text="ms", title_standoff=8, row=len(drawings), col=1)
    figure.update_layout(
        barmode="overlay",
        bargap=0.08,
        height=height,
        legend=_below(height),
        uniformtext={"minsize": 9, "mode": "hide"},
        hoverlabel={"align": "left"},
        dragmode="zoom",
    )
    return figure


def _boxes(timeline: Timeline, shown: set[str]) -> list[Any]:
    """One trace a colour; `shown` collects what the legend has."""
    from plotly.graph_objects import Bar

    begin = min((span.start for span in timeline.spans), default=0.0)
    groups: dict[tuple[str, bool], list[tuple[float, float, int, str, str]]] = {}
    for span in timeline.spans:
        hover = _hover(span, begin)
        for cell in cells_of(span):
            box = ((cell.start - begin) * _MS, (cell.end - cell.start) * _MS, cell.rank)
            number = str(cell.micro) if cell.micro >= 0 else ""
            groups.setdefault((cell.kind, cell.second), []).append((*box, number, hover))
    note = second_note(timeline)
    traces = []
    for kind in kinds_of(timeline):
        for second in (False, True):
            boxes = groups.get((kind, second))
            if not boxes:
                continue
            starts, lengths, ranks, numbers, hovers = zip(*boxes, strict=True)
            name = PALETTE[kind][0] + (f", {note.split(' (')[0]}" if second else "")
            traces.append(
                Bar(
                    name=name,
                    legendgroup=name,
                    showlegend=name not in shown,
                    orientation="h",
                    base=_rounded(starts),
                    x=_rounded(lengths),
                    y=ranks,
                    text=numbers,
                    textposition="inside",
                    insidetextanchor="middle",
                    textangle=0,
                    textfont={"color": "#ffffff" if second else "#20242a"},
                    marker={"color": PALETTE[kind][1 + second], "line": {"width": 0.4, "color": "#ffffff"}},
                    hovertext=hovers,
                    hoverinfo="text",
                )
            )
            shown.add(name)
    return traces


def _reduced(timeline: Timeline) -> Heatmap:
    """A picture of `COLUMNS` columns of time."""
    from plotly.graph_objects import Heatmap

    shades = [(kind, second) for kind in PALETTE for second in (False, True)]
    colours = ["rgba(0,0,0,0)", *(PALETTE[kind][1 + second] for kind, second in shades)]
    begin = min(span.start for span in timeline.spans)
    width = timeline.makespan / COLUMNS
    numbers, hovers = [], []
    for rank, owners in enumerate(columns(timeline, width, COLUMNS)):
        spans = [None if owner is None else timeline.spans[owner] for owner in owners]
        firsts = [span.op.parts[0] if span and span.op.parts else span.op if span else None for span in spans]
        numbers.append([1 + shades.index((op.kind, is_second(op, rank))) if op else 0 for op in firsts])
        hovers.append([_hover(span, begin) if span else "idle" for span in spans])
    steps = len(colours)
    scale = [[at / steps, colour] for index, colour in enumerate(colours) for at in (index, index + 1)]
    return Heatmap(
        z=numbers,
        x=_rounded((column + 0.5) * width * _MS for column in range(COLUMNS)),
        y=list(range(timeline.num_ranks)),
        colorscale=scale,
        zmin=0,
        zmax=steps,
        showscale=False,
        ygap=2,
        hovertext=hovers,
        hoverinfo="text",
    )


def _hover(span: Span, begin: float) -> str:
    start, end = (span.start - begin) * _MS, (span.end - begin) * _MS
    return f"<b>{span.op}</b> on rank {span.rank}<br>{start:.3f} to {end:.3f} ms<br>{end - start:.3f} ms"


def where_time_goes(profile: Profile) -> Figure:
    """What the step of each rank divides into."""
    from plotly.graph_objects import Bar, Figure

    names = [rank.name for rank in profile.ranks]
    bars = [
        Bar(
            name=_LABELS.get(category, category),
            y=names,
            x=_rounded(rank.seconds.get(category, 0.0) * _MS for rank in profile.ranks),
            orientation="h",
            marker={"color": _SHARES[category]},
            hovertemplate="%{y}: %{x:.2f} ms %{fullData.name}<extra></extra>",
        )
        for category in CATEGORIES
        if any(rank.seconds.get(category) for rank in profile.ranks)
    ]
    figure = Figure(bars)
    height = 130 + 30 * len(names)
    figure.update_layout(barmode="stack", height=height, legend=_below(height))
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="ms of a step", title_standoff=8)
    return figure


def communication(profile: Profile) -> Figure:
    """Hidden and exposed seconds of transfers and of reductions."""
    from plotly.graph_objects import Bar, Figure

    names = [rank.name for rank in profile.ranks]
    figure = Figure()
    for kind, label, colours in (
        (COMMUNICATION, "communication", ("#7fb7be", "#d1495b")),
        (REDUCING, "reduction", ("#cdb4e6", "#8457b5")),
    ):
        parts = ("hidden", [rank.hidden.get(kind, 0.0) for rank in profile.ranks], colours[0])
        exposed = ("exposed", [rank.seconds.get(kind, 0.0) for rank in profile.ranks], colours[1])
        for part, seconds, colour in (parts, exposed):
            figure.add_trace(
                Bar(
                    name=f"{label}, {part}",
                    x=names,
                    y=_rounded(second * _MS for second in seconds),
                    offsetgroup=kind,
                    marker={"color": colour},
                    hovertemplate="%{x}: %{y:.2f} ms %{fullData.name}<extra></extra>",
                )
            )
    figure.update_layout(barmode="stack", height=340, legend=_below(340))
    figure.update_yaxes(title_text="ms of a step")
    return figure


def expert_rows(load: LoadReport) -> Figure:
    """A row a layer, a column an expert: its rows by the mean of the layer."""
    from plotly.graph_objects import Figure, Heatmap

    shares = [[each * len(layer.rows) / max(1, sum(layer.rows)) for each in layer.rows] for layer in load.layers]
    picture = Heatmap(
        z=[_rounded(row) for row in shares],
        y=[f"layer {layer.layer}" for layer in load.layers],
        colorscale="RdBu_r",
        zmid=1.0,
        ygap=2,
        colorbar={"title": {"text": "by the mean"}},
        customdata=[list(layer.rows) for layer in load.layers],
        hovertemplate="%{y}, expert %{x}: %{customdata} rows, %{z:.2f}x the mean<extra></extra>",
    )
    figure = Figure(picture)
    figure.update_layout(height=150 + 24 * len(load.layers))
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(title_text="expert")
    return figure


def unevenness(history: Sequence[Mapping[str, float]]) -> Figure | None:
    """The busiest expert of each layer by the mean over the steps; None where nothing of it was logged."""
    from plotly.graph_objects import Figure, Scatter

    names = dict.fromkeys(name for row in history for name in row if PREFIX in name and name.endswith(UNEVEN))
    figure = Figure()
    for name in names:
        found = _series(history, [name])
        assert found is not None
        layer = name.partition(PREFIX)[2].removesuffix(f"/{UNEVEN}").replace("_", " ", 1)
        figure.add_trace(Scatter(name=layer, x=found[0], y=found[1], mode="lines+markers"))
    if not names:
        return None
    figure.update_layout(height=340, showlegend=True, legend=_below(340))
    figure.update_xaxes(title_text="step", title_standoff=8)
    figure.update_yaxes(title_text="busiest expert, by the mean")
    return figure


def memory(drawings: Mapping[str, Timeline]) -> Figure:
    """Activations that each rank holds over the step.

    Args:
        drawings: title -> timeline in seconds, of the same ranks.
    """
    from plotly.colors import qualitative
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(drawings), shared_yaxes=True, subplot_titles=list(drawings))
    for column, timeline in enumerate(drawings.values(), 1):
        for rank, points in enumerate(held_over_time(timeline)):
            times, counts = zip(*points, strict=True) if points else ((), ())
            figure.add_trace(
                Scatter(
                    name=f"rank {rank}",
                    legendgroup=str(rank),
                    showlegend=column == 1,
                    x=_rounded(time * _MS for time in times),
                    y=counts,
                    mode="lines",
                    line={"shape": "hv", "width": 1.5, "color": qualitative.Plotly[rank % 10]},
                ),
                row=1,
                col=column,
            )
    figure.update_layout(height=360)
    figure.update_xaxes(title_text="ms")
    figure.update_yaxes(title_text="(stage, micro-batch) activations", col=1, rangemode="tozero")
    return figure


def curves(history: Sequence[Mapping[str, float]]) -> Figure | None:
    """Loss and learning rate over the steps; None where no loss was logged."""
    from plotly.graph_objects import Figure, Scatter

    losses = _series(history, ("loss", "train_loss"))
    if losses is None:
        return None
    figure = Figure([Scatter(name="loss", x=losses[0], y=losses[1], mode="lines", line={"color": "#2c6fbb"})])
    evaluated = _series(history, ("eval_loss", "val_loss"))
    if evaluated is not None:
        figure.add_trace(
            Scatter(
                name="evaluation loss", x=evaluated[0], y=evaluated[1], mode="lines+markers", line={"color": "#2c8a50"}
            )
        )
    watched = sorted(name for name in {name for row in history for name in row} if name.startswith("lr-"))
    rates = _series(history, ("learning_rate", "lr", *watched))  # those of Lightning's monitor name the optimizer
    if rates is not None:
        look = {"color": "#dc7a12", "dash": "dot"}
        figure.add_trace(Scatter(name="learning rate", x=rates[0], y=rates[1], yaxis="y2", mode="lines", line=look))
        figure.update_layout(
            yaxis2={
                "overlaying": "y",
                "side": "right",
                "title": "learning rate",
                "tickmode": "auto",
                "nticks": 6,
                "exponentformat": "e",
                "showgrid": False,
            }
        )
    figure.update_layout(height=340, legend=_below(340))
    figure.update_xaxes(title_text="step", title_standoff=8)
    figure.update_yaxes(title_text="loss", selector={"overlaying": None})
    return figure


def _series(history: Sequence[Mapping[str, float]], names: Sequence[str]) -> tuple[list[float], list[float]] | None:
    for name in names:
        rows = [row for row in history if name in row]
        if rows:
            return [row["step"] for row in rows], [row[name] for row in rows]
    return None


def choices(rows: Sequence[Row], current: str) -> Figure:
    """Makespan beside peak activations of each row that has a plan.

    Args:
        rows: of `what_if`.
        current: the schedule that ran; it is marked.
    """
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for schedule in dict.fromkeys(row.schedule for row in rows if row.feasible):
        mine = sorted(
            (row for row in rows if row.schedule == schedule and row.feasible), key=lambda r: r.peak_activations
        )
        hovers = [
            f"<b>{row.schedule}</b>{'' if row.cap is None else f', cap {row.cap}'}<br>{row.makespan * _MS:.2f} ms, "
            f"bubble {row.bubble * _MS:.2f} ms<br>{row.peak_activations:g} activations<br>"
            f"{row.parameter_copies}x parameters"
            for row in mine
        ]
        figure.add_trace(
            Scatter(
                name=schedule + (" (this run)" if schedule == current else ""),
                x=[row.peak_activations for row in mine],
                y=_rounded(row.makespan * _MS for row in mine),
                mode="lines+markers",
                marker={
                    "size": 13 if schedule == current else 9,
                    "symbol": "star" if schedule == current else "circle",
                },
                hovertext=hovers,
                hoverinfo="text",
            )
        )
    figure.update_layout(height=420)
    figure.update_xaxes(title_text="peak activations of the fullest rank, in those of a full stage", rangemode="tozero")
    figure.update_yaxes(title_text="ms from the first to the last op")
    return figure


def _below(height: int) -> dict[str, Any]:
    """A legend under a figure of `height` pixels, which makes room for as many lines as it takes."""
    return {"orientation": "h", "y": -_TICKS_AND_TITLE / (height - _AROUND), "yanchor": "top", "traceorder": "normal"}


def _rounded(values: Iterable[float]) -> list[float]:
    """To a nanosecond, if they are milliseconds: digits beyond that only make the file longer."""
    return [round(value, 6) for value in values]
