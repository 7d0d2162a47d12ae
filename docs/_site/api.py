"""Site: a page for each module, made of its docstrings, by walking the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dualpipe_engine", "integrations")
INSTALLED = {"integrations": "dualpipe_engine.integrations"}  #: what a folder beside the package is imported as


def on_files(files: Any, config: Any) -> Any:
    section: list[Any] = next(entry["API"] for entry in config.nav if "API" in entry)
    for package in PACKAGES:
        section.append(_folder(ROOT / package, files, config))
    return files


def _folder(folder: Path, files: Any, config: Any) -> dict[str, list[Any]]:
    """Make the pages of a folder and those below; returns its part of the navigation."""
    inner: list[Any] = [_page(folder / "__init__.py", files, config)]
    inner += [_page(path, files, config) for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    inner += [_folder(path.parent, files, config) for path in sorted(folder.glob("*/__init__.py"))]
    return {folder.name: inner}


def _page(path: Path, files: Any, config: Any) -> Any:
    parts = path.relative_to(ROOT).with_suffix("").parts
    index = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if index else parts)
    place = f"api/{'/'.join((*parts[:-1], 'index') if index else parts)}.md"
    top, _, rest = module.partition(".")
    title = ".".join(filter(None, (INSTALLED.get(top, top), rest)))
    files.append(File.generated(config, place, content=f"# {title}\n\n::: {module}\n"))
    return place if index else {parts[-1]: place}
