"""Site: pages of docs/ that the navigation does not name stand at the end of the guides."""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import InclusionLevel


def on_files(files: Any, config: Any) -> Any:
    named = set(_pages(config.nav))
    guides: list[Any] = next(section["Guides"] for section in config.nav if "Guides" in section)
    guides += sorted(
        file.src_uri
        for file in files.documentation_pages()
        if "/" not in file.src_uri and file.src_uri not in named and file.inclusion is not InclusionLevel.EXCLUDED
    )
    return files


def _pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in _pages(each)]
