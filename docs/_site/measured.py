"""Site: a page for each JSON file of docs/measured, which `tests/gpu.sh` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File


def on_files(files: Any, config: Any) -> Any:
    section: list[Any] = next(entry["Measured"] for entry in config.nav if "Measured" in entry)
    for path in sorted(Path(config.docs_dir, "measured").glob("*.json")):
        place = f"measured/{path.stem}.md"
        files.append(File.generated(config, place, content=page(json.loads(path.read_text()), path.name)))
        section.append(place)
    return files


def page(report: dict[str, Any], file: str) -> str:
    """A report as a page: what it ran on, a table of the checks, and the numbers of each.

    Args:
        report: what `tests/gpu.sh` has written.
        file: its name.
    """
    checks = report["checks"]
    facts = [f"- {name}: {value}" for name, value in report.items() if name not in ("hardware", "checks") and value]
    rows = [f"| {line['check']} | {line['name']} | {line['result']} | {line['seconds']:.1f} |" for line in checks]
    text = [f"# {report['hardware']}", "\n".join(facts), f"All of it: [{file}]({file})."]
    text += ["## Checks", "\n".join(["| check | what it shows | result | seconds |", "|---|---|---|---|", *rows])]
    for line in checks:
        found = line.get("facts") or {}
        if found:
            text += [f"### {line['check']}: {line['name']}"]
            text += ["\n".join(f"- {name}: `{value}`" for name, value in found.items())]
    return "\n\n".join(text) + "\n"
