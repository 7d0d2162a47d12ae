"""Run: what a training run left in its folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanError, ProfileError
from ..profiling.profile import Profile, read_profile
from ..schedule.plain_json import parse, read_settings, read_text
from ..schedule.timeline import Timeline
from ..viz.chrome import read_chrome

PROFILE = "dualpipe_profile.json"


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: stands above the page.
        profile: of its last steps.
        measured: the recorded step of median length, first pipeline.
        history: a row for each logged step, oldest first: "step" and what was logged with it.
        config: the DeepSpeed JSON, empty where the folder has none.
    """

    name: str
    profile: Profile
    measured: Timeline
    history: Sequence[Mapping[str, float]]
    config: Mapping[str, Any]


def read_run(path: str | Path) -> Run:
    """Read a folder, or a profile alone.

    Args:
        path: what `Profiler.save_to_file` wrote, or a folder with such a file under the name `dualpipe_profile.json`.
            Beside it may lie the losses (`metrics.jsonl` of the examples, `trainer_state.json` of a Hugging Face
            Trainer, `metrics.csv` of Lightning's CSVLogger) and the configuration (`ds_config.json`).

    Raises:
        ProfileError: there is no profile, or a file cannot be read.
    """
    path = Path(path)
    folder = path if path.is_dir() else None
    file = folder / PROFILE if folder else path
    if folder and not file.exists():
        raise ProfileError(
            f"{folder}: there is no {PROFILE}; call enable_profiling() before the training and "
            f'get_profiler().save_to_file("{PROFILE}") after it, with this folder as log_dir'
        )
    profile = read_profile(file)
    try:
        measured = read_chrome(file)
    except PlanError as error:
        raise ProfileError(str(error)) from None
    name = folder.resolve().name if folder else file.stem
    return Run(name, profile, measured, _history(folder) if folder else [], _config(folder) if folder else {})


def _history(folder: Path) -> list[dict[str, float]]:
    """The rows of the newest log in the folder; of equal steps the last one counts, as a resumed run repeats some."""
    found = [each for pattern in _LOGS for each in sorted(folder.glob(pattern))]
    if not found:
        return []
    newest = max(found, key=lambda each: each.stat().st_mtime)
    try:
        rows = _LOG_READERS[newest.suffix](read_text(newest))
        numbers = [_numbers(row) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError, KeyError, csv.Error) as error:
        raise ProfileError(f"{newest}: is no log of a training ({type(error).__name__}: {error})") from None
    by_step: dict[float, dict[str, float]] = {}
    for row in numbers:
        if "step" in row:
            by_step.setdefault(row["step"], {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in row.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            continue  # text, an empty cell
    return found


def _json_lines(text: str) -> list[Any]:
    return [parse(line) for line in text.splitlines() if line.strip()]


def _trainer_state(text: str) -> list[Any]:
    state: Any = parse(text)
    rows: list[Any] = state["log_history"]
    return rows


def _csv_rows(text: str) -> list[Any]:
    return list(csv.DictReader(text.splitlines()))


_CSV = ("metrics.csv", "*/metrics.csv", "*/*/metrics.csv")  # of versions, of names and their versions
_LOGS = ("metrics.jsonl", "trainer_state.json", "checkpoint-*/trainer_state.json", *_CSV)
_LOG_READERS = {".jsonl": _json_lines, ".json": _trainer_state, ".csv": _csv_rows}


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "ds_config.json"
    if not file.exists():
        return {}
    try:
        return read_settings(str(file))
    except (OSError, ValueError) as error:
        raise ProfileError(f"cannot read the DeepSpeed configuration {file}: {error}") from None
