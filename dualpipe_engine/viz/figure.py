"""Drawing of a timeline as SVG or PNG (matplotlib), like figure 5 of the DeepSeek-V3 report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MissingExtraError
from ..schedule.aside import written_aside
from ..schedule.op import BESIDE, COMM, COPIES, FB, STEP, B, F, atoms
from ..schedule.timeline import Timeline
from .cells import INK, PALETTE, cells_of, columns, has_pairs, headline, is_second, kinds_of, quantum, second_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CELLS = 5000  #: more cells than this are drawn at reduced detail
REDUCED_COLUMNS = 1600
IDLE = "#f4f5f7"
GREY = "#555b66"
_LINES = ((COMM, GREY), (COPIES, "#c2357a"))  #: what is drawn as a line below the boxes
FRAME = "#111111"


def save_figure(path: str | Path, timeline: Timeline, title: str = "", unit: str = "") -> None:
    """Write the timeline as `.svg` (text stays text) or `.png`.

    Timelines of more than `MAX_CELLS` cells are drawn at reduced detail, and the picture says so: each column of time
    shows what fills most of it, without numbers.

    Raises:
        ConfigError: the path has another ending or cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"{path}: a drawing ends in .svg or .png")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("drawing SVG or PNG needs matplotlib: pip install matplotlib") from None

    reduced = sum(len(atoms(span.op)) for span in timeline.spans) > MAX_CELLS
    makespan, ranks = timeline.makespan or 1.0, timeline.num_ranks
    boxes_across = makespan / (quantum(timeline) or _short(timeline))
    plot_width = 16.0 if reduced else min(24.0, max(9.0, 0.24 * boxes_across))
    row = min(0.42, 20.0 / ranks)
    entries, note = _legend_entries(timeline), second_note(timeline)
    across = len(entries) if plot_width > 13 else 3
    plot_height, left, right, top = row * ranks, 0.95, 0.25, 0.75
    bottom = 0.7 + 0.21 * (-(-len(entries) // across) + bool(note))
    width, height = plot_width + left + right, plot_height + top + bottom

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dualpipe", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), dpi=150)
        axes = figure.add_axes((left / width, bottom / height, plot_width / width, plot_height / height))
        _frame_axes(axes, timeline, unit, row)
        if reduced:
            _draw_columns(axes, timeline)
        else:
            _draw_cells(axes, timeline, points_per_unit=72 * plot_width / makespan, row_points=72 * row)
        subtitle = headline(timeline, unit)
        if reduced:
            subtitle += "; reduced detail: each column of time shows what fills most of it"
        figure.text(left / width, 1 - 0.30 / height, title or "Schedule", size=13, weight="bold", color=INK[0])
        figure.text(left / width, 1 - 0.55 / height, subtitle, size=9.5, color=GREY)
        _add_legend(figure, entries, note, across, (left / width, 0.12 / height))
        try:
            with written_aside(path) as part:
                metadata = {"Date": None} if path.suffix == ".svg" else None
                figure.savefig(part, format=path.suffix[1:], metadata=metadata)
        except (OSError, ValueError) as error:  # of a name that no file can have
            raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _short(timeline: Timeline) -> float:
    """A duration that three of four ops exceed: measured durations have outliers, so the shortest says little."""
    lengths = sorted(span.end - span.start for span in timeline.spans if span.op.kind not in BESIDE)
    return (lengths[len(lengths) // 4] if lengths else 0.0) or timeline.makespan or 1.0


def _frame_axes(axes: Axes, timeline: Timeline, unit: str, row: float) -> None:
    ranks = timeline.num_ranks
    axes.set_xlim(0, timeline.makespan or 1.0)
    axes.set_ylim(ranks, 0)
    axes.set_yticks([rank + 0.5 for rank in range(ranks)], [f"Device {rank}" for rank in range(ranks)])
    axes.tick_params(axis="y", length=0, labelsize=min(9.5, 50 * row), labelcolor=INK[0])
    axes.tick_params(axis="x", color="#9aa0aa", labelsize=8.5, labelcolor=GREY)
    axes.set_xlabel(f"time [{unit}]" if unit else "time", size=9, color=GREY)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9aa0aa")
    axes.set_facecolor(IDLE)


def _draw_cells(axes: Axes, timeline: Timeline, points_per_unit: float, row_points: float) -> None:
    """Boxes of one colour are one compound path, which keeps an SVG of thousands of boxes small."""
    begin = min(span.start for span in timeline.spans) if timeline.spans else 0.0
    cells = [cell for span in timeline.spans for cell in cells_of(span)]
    beside = [span for span in timeline.spans if span.op.kind in BESIDE]
    height = 0.72 if beside else 0.88
    top = 0.06
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for cell in cells:
        box = (cell.start - begin, cell.end - begin, cell.rank + top, cell.rank + top + height)
        boxes.setdefault(PALETTE[cell.kind][1 + cell.second], []).append(box)
    for colour, group in boxes.items():
        _add_boxes(axes, group, facecolor=colour, edgecolor="#ffffff", linewidth=0.7)
    for kinds, colour in _LINES:
        lines = [(s.start - begin, s.end - begin, s.rank + 0.82, s.rank + 0.94) for s in beside if s.op.kind in kinds]
        _add_boxes(axes, lines, facecolor=colour, edgecolor="none", alpha=0.55)
    pairs = [
        (span.start - begin, span.end - begin, span.rank + top, span.rank + top + height)
        for span in timeline.spans
        if span.op.kind == FB
    ]
    _add_boxes(axes, pairs, facecolor="none", edgecolor=FRAME, linewidth=1.1)

    for cell in cells:
        text = str(cell.micro) if cell.micro >= 0 else cell.kind[0]
        room = (cell.end - cell.start) * points_per_unit
        size = min(9.5, 0.48 * row_points, 0.8 * room / (0.64 * len(text)))  # a digit is 0.64 em wide
        if size >= 4:
            x, y = (cell.start + cell.end) / 2 - begin, cell.rank + top + height / 2
            weight = "bold" if cell.second else "normal"
            look: dict[str, Any] = {"size": round(size, 1), "weight": weight, "color": INK[cell.second]}
            axes.text(x, y, text, ha="center", va="center_baseline", **look)


def _add_boxes(axes: Axes, boxes: Iterable[tuple[float, float, float, float]], **style: Any) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    corners, codes = [], []
    for left, right, top, bottom in boxes:
        corners += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes += [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    if corners:
        axes.add_patch(PathPatch(Outline(corners, codes), joinstyle="miter", **style))


def _draw_columns(axes: Axes, timeline: Timeline) -> None:
    """One image, two lines of pixels and a gap a rank: an overlapped pair has its forward above its backward."""
    import numpy as np
    from matplotlib.colors import to_rgb

    shades = [(kind, second) for kind in PALETTE for second in (False, True)]
    number = {shade: index for index, shade in enumerate(shades)}
    colours = np.array([to_rgb(PALETTE[kind][1 + second]) for kind, second in shades] + [to_rgb(IDLE), (1, 1, 1)])
    idle, gap = len(shades), len(shades) + 1
    image = []
    for rank, owners in enumerate(columns(timeline, timeline.makespan / REDUCED_COLUMNS, REDUCED_COLUMNS)):
        parts = [None if owner is None else atoms(timeline.spans[owner].op) for owner in owners]
        for line in (0, -1):
            image += [[number[p[line].kind, is_second(p[line], rank)] if p else idle for p in parts]] * 4
        image.append([gap] * REDUCED_COLUMNS)
    extent = (0, timeline.makespan, timeline.num_ranks, 0)
    axes.imshow(colours[np.array(image)], extent=extent, aspect="auto", interpolation="nearest")


def _legend_entries(timeline: Timeline) -> dict[str, Any]:
    """Name -> patches that stand side by side."""
    from matplotlib.patches import Patch

    two = bool(second_note(timeline))
    entries: dict[str, Any] = {}
    for kind in kinds_of(timeline):
        shades = PALETTE[kind][1:] if two and kind != STEP else PALETTE[kind][1:2]
        entries[PALETTE[kind][0].capitalize()] = tuple(Patch(facecolor=shade, edgecolor="white") for shade in shades)
    if has_pairs(timeline):
        pair = (PALETTE[F][1], PALETTE[B][1 + two])
        framed = tuple(Patch(facecolor=shade, edgecolor=FRAME, linewidth=1.1) for shade in pair)
        entries["Overlapped forward & backward (shared border)"] = framed
    for (kinds, colour), name in zip(_LINES, ("Transfer", "Copy to or from host memory"), strict=True):
        if any(span.op.kind in kinds for span in timeline.spans):
            entries[name] = (Patch(facecolor=colour, alpha=0.55),)
    return entries


def _add_legend(figure: Figure, entries: dict[str, Any], note: str, columns: int, place: tuple[float, float]) -> None:
    from matplotlib.legend_handler import HandlerTuple

    legend = figure.legend(
        list(entries.values()),
        list(entries),
        loc="lower left",
        bbox_to_anchor=place,
        ncols=columns,
        title=f"Light, dark numbers: first stage of the device. Dark, white numbers: {note}." if note else None,
        alignment="left",
        frameon=False,
        fontsize=9.5,
        title_fontsize=9.5,
        handlelength=2.6,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        borderaxespad=0,
        borderpad=0,
    )
    legend.get_title().set_color(GREY)
