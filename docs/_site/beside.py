"""Site: pages that lie beside docs/, and links between the two.

In the repository a link is a path to a file. On the site files have other addresses, and sources have none: a link to a
page is rewritten, one to a source file is left as its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {  #: file of the repository -> page of the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
PICTURES = {"examples/dualpipe_8x20.svg": "pictures/dualpipe_8x20.svg"}
_LINK = re.compile(r"(!?)\[((?:`[^`]*`|[^\[\]`])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)


def on_files(files: Any, config: Any) -> Any:
    for source, page in {**PAGES, **PICTURES}.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    uri = page.file.src_uri
    source = next((source for source, place in PAGES.items() if place == uri), f"docs/{uri}")
    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else relink(part, source, uri) for part in parts)


def relink(markdown: str, source: str, uri: str) -> str:
    """Links of a file of the repository as links of a page of the site.

    Args:
        markdown: the text.
        source: the file, from the root of the repository.
        uri: the page, from the root of the site.
    """

    def link(match: re.Match[str]) -> str:
        picture, label, target, anchor = match.groups(default="")
        if "://" in target:
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = {**PAGES, **PICTURES}.get(path)
        if place is None and PurePosixPath(path).parts[0] == "docs":
            place = path.removeprefix("docs/")
        if place is None:
            return label
        return f"{picture}[{label}]({posixpath.relpath(place, posixpath.dirname(uri) or '.')}{anchor})"

    return _LINK.sub(link, markdown)
