"""The part of a plan around one op, as text, for errors."""

from __future__ import annotations

from .plan import Plan

_AROUND = 3


def window(plan: Plan, rank: int, index: int) -> str:
    """Ranks around `rank`, ops around `index`; an arrow marks the op."""
    ranks = range(max(0, rank - _AROUND), min(len(plan.programs), rank + _AROUND + 1))
    first = max(0, index - _AROUND)
    rows = []
    for other in ranks:
        cells = [str(op) for op in plan.programs[other][first : index + _AROUND + 1]]
        if other == rank:
            at = index - first
            cells[at : at + 1] = [f">>{cells[at]}<<" if at < len(cells) else ">>end<<"]
        rows.append([f"rank {other}", *cells])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return f"ops from position {first}:\n" + "\n".join(lines)
