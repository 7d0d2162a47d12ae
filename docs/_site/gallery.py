"""Site: a gallery of all schedules, drawn and compared by the `dualpipe` command."""

from __future__ import annotations

import json
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from dualpipe_engine.cli import main

SIZES = ((4, 8), (8, 20))  #: ranks, micro-batches
COSTS = "1,1,1,2.25"  #: F, I, W and an overlapped pair

_HEAD = f"""# Gallery

Every schedule as `dualpipe draw` shows it, one row a rank, time to the right. F is a forward, B a full backward, I and
W its two parts (gradient of the input, gradient of the weights); a pair of a forward and a backward is one box of two
colours. `--costs {COSTS}`: F, I and W take 1, an overlapped pair 2.25. These are reference orders; `--optimize` takes
the best candidate. How a schedule is read and written is told in [schedules](schedules.md).
"""


def on_files(files: Any, config: Any) -> Any:
    text = [_HEAD]
    with tempfile.TemporaryDirectory() as folder:
        for ranks, micros in SIZES:
            work = ["--ranks", str(ranks), "--micro-batches", str(micros), "--costs", COSTS]
            rows = json.loads(_run("compare", "--format", "json", *work))["schedules"]
            text += [f"## {ranks} ranks, {micros} micro-batches", _table(rows)]
            for row in rows:
                name = row["schedule"]
                path, place = Path(folder, "drawing.svg"), f"pictures/{name}_{ranks}x{micros}.svg"
                command = ["draw", "--schedule", name, *work]
                _run(*command, "--out", str(path))
                files.append(File.generated(config, place, content=path.read_bytes()))
                shown = f"```bash\ndualpipe {' '.join(command)} --out {name}.svg\n```"
                text += [f"### {name}, {ranks} x {micros}", f"![{name}]({place})", shown]
    files.append(File.generated(config, "gallery.md", content="\n\n".join(text)))
    return files


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| schedule | time | bubble | activations | parameters |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = (f"{row[key]:.6g}" for key in ("makespan", "bubble", "peak_activations"))
        lines.append(f"| {row['schedule']} | {' | '.join(numbers)} | {row['parameter_copies']}x |")
    return "\n".join(lines)


def _run(*arguments: str) -> str:
    output = StringIO()
    with redirect_stdout(output):
        code = main(arguments)
    assert code == 0, f"dualpipe {' '.join(arguments)} ends with {code}"
    return output.getvalue()
