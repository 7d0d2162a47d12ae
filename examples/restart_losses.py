"""The losses of restart.sh's runs side by side; the exit code is 1 if one of them differs in a bit."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

RUNS = ("uninterrupted", "torchrun", "deepspeed")


def read_losses(file: Path) -> dict[int, list[float]]:
    """Step -> its losses: more than one where a run did the step again after a restart."""
    found: dict[int, list[float]] = defaultdict(list)
    for line in file.read_text().splitlines():
        row = json.loads(line)
        found[row["step"]].append(row["loss"])
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the runs")
    folder = parser.parse_args().folder
    losses = {run: read_losses(folder / run / "losses.jsonl") for run in RUNS}
    expected = losses[RUNS[0]]
    same = True
    table = Table("step", *RUNS, "bits")
    for step in sorted(expected):
        found = {run: losses[run].get(step, []) for run in RUNS}
        equal = all(each and set(each) == set(expected[step]) for each in found.values())
        same = same and equal
        cells = [", ".join(f"{loss:.6f}" for loss in found[run]) for run in RUNS]
        table.add_row(str(step), *cells, "equal" if equal else "DIFFERENT")
    Console().print(table)
    sys.exit(not same)


if __name__ == "__main__":
    main()
