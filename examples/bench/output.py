"""What the benchmarks write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def write(out: Path | None, title: str, rows: Rows, plot: Callable[[Rows, str, Path], None]) -> None:
    """Write FILE.json with the rows and FILE.png with what `plot(rows, title, path)` draws, where a FILE is given."""
    if out:
        out.with_suffix(".json").write_text(json.dumps({"title": title, "rows": rows}, indent=1))
        plot(rows, title, out.with_suffix(".png"))
