"""Hooks of mkdocs: pages and pictures of the site that lie outside of docs/, and links to them.

The README is the front page of the site. Its links and those of the pages are right on the page of
the repository, and are rewritten here for the site. A link to a file that the site does not have,
such as source code, becomes its text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository -> their pages."""
_CODE = re.compile(r"(^```.*?^```$)", re.M | re.S)
_LINK = re.compile(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")


def site_path(path: str) -> str | None:
    """Return the place in the site of a file of the repository; None if it has none."""
    if path in PAGES or path.startswith("docs/"):
        return PAGES.get(path) or path.removeprefix("docs/")
    return f"measured/{path.replace('/', '-')}" if path.endswith(".png") else None


def targets(text: str, source: str) -> list[str]:
    """Return the files of the repository that the page of the file ``source`` links to."""
    return [_resolve(found[3], source) for found in _LINK.finditer(_CODE.sub("", text))]


def rewrite(text: str, source: str) -> str:
    """Return a page with the links of the site.

    Args:
        text: Markdown.
        source: the file of the page, as a path in the repository.
    """
    folder = posixpath.dirname(site_path(source) or "") or "."

    def link(found: re.Match) -> str:
        mark, label, target, anchor = found.groups(default="")
        place = site_path(_resolve(target, source))
        if place is None:
            return label
        return f"{mark}[{label}]({posixpath.relpath(place, folder)}{anchor})"

    pieces = _CODE.split(text)
    pieces[::2] = [_LINK.sub(link, piece) for piece in pieces[::2]]
    return "".join(pieces)


def _resolve(target: str, source: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and the pictures that lie outside of docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    sources = [*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    pictures = {
        target
        for source in sources
        for target in targets((ROOT / source).read_text(encoding="utf-8"), source)
        if target.endswith(".png")
    }
    for picture in sorted(pictures):
        path = str(ROOT / picture)
        files.append(File.generated(config, str(site_path(picture)), abs_src_path=path))
    return files


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Rewrite the links of a page for the site."""
    sources = {place: source for source, place in PAGES.items()}
    place = page.file.src_uri
    return rewrite(markdown, sources.get(place, f"docs/{place}"))
