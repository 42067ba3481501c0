"""What the rival publishes: its pages in each version, rendered to HTML, and the list of what differs between them.

Everything is deterministic: the same version is the same bytes on every machine, so entity tags are stable.
"""

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markdown_it import MarkdownIt

_HERE = Path(__file__).parent
_FIRST_PUBLISHED = datetime(2026, 11, 2, 8, 0, tzinfo=UTC)
_SECOND_PUBLISHED = datetime(2026, 11, 18, 9, 30, tzinfo=UTC)

VERSIONS = (1, 2)
HIDDEN_PAGES = frozenset({"/preview/black-friday", "/preview/pricing-2027"})
"""Listed in the sitemap by mistake, and disallowed by robots.txt: a polite visitor leaves them alone."""


class Change(StrEnum):
    """What happened to a page between two versions, as a monitor should call it."""

    ADDED = "added"
    REMOVED = "removed"
    EDITED = "edited"
    PRICE = "price"


@dataclass(frozen=True)
class SitePage:
    path: str
    html: bytes
    etag: str
    last_modified: datetime


@dataclass(frozen=True)
class Site:
    """One version of the whole site."""

    version: int
    pages: Mapping[str, SitePage]

    @property
    def public_paths(self) -> list[str]:
        """What a visitor who honours robots.txt may read, in order."""
        return sorted(self.pages.keys() - HIDDEN_PAGES)


@cache
def load_site(version: int) -> Site:
    """Render one version of the site; raises ValueError for a version that does not exist."""
    if version not in VERSIONS:
        raise ValueError(f"the rival's site has versions {VERSIONS}, not {version!r}")
    first = {path: _render(path, text, version=1) for path, text in _first_texts().items()}
    if version == 1:
        return Site(1, {path: _page(path, html, _published(path)) for path, html in first.items()})
    pages = {}
    for path, text in _second_texts().items():
        html = _render(path, text, version=2)
        changed = html != first.get(path)
        pages[path] = _page(path, html, _SECOND_PUBLISHED if changed else _published(path))
    return Site(2, pages)


@cache
def expected_changes() -> Mapping[str, Change]:
    """Path to change, from the list of edits alone: the yardstick for what a monitor finds."""
    overlay = _overlay()
    changes = dict.fromkeys(overlay["removed"], Change.REMOVED)
    changes |= dict.fromkeys(_read_folder("added"), Change.ADDED)
    for edit in overlay["edit"]:
        kind = Change(edit.get("expect", "edited"))
        if changes.get(edit["page"]) is not Change.PRICE:
            changes[edit["page"]] = kind
    return changes


def _first_texts() -> dict[str, str]:
    return _read_folder("pages")


def _second_texts() -> dict[str, str]:
    texts = _first_texts()
    overlay = _overlay()
    for path in overlay["removed"]:
        del texts[path]
    for edit in overlay["edit"]:
        before = texts[edit["page"]]
        if before.count(edit["find"]) != 1:
            raise ValueError(f"{edit['page']}: an edit must find its text exactly once: {edit['find']!r}")
        texts[edit["page"]] = before.replace(edit["find"], edit["replace"])
    return texts | _read_folder("added")


def _overlay() -> dict[str, Any]:
    return tomllib.loads((_HERE / "second-version.toml").read_text(encoding="utf-8"))


def _read_folder(name: str) -> dict[str, str]:
    folder = _HERE / name
    texts = {}
    for file in sorted(folder.rglob("*.md")):
        path = "/" + file.relative_to(folder).with_suffix("").as_posix()
        texts["/" if path == "/index" else path] = file.read_text(encoding="utf-8")
    return texts


def _render(path: str, text: str, *, version: int) -> bytes:
    heading = text.partition("\n")[0].removeprefix("# ")
    section = path.strip("/").partition("/")[0] or "home"
    summary = next((line for line in text.splitlines()[1:] if line and line[0].isalpha()), heading)
    html = _layout().render(
        path=path, section=section, heading=heading, summary=summary, version=version, body=_markdown().render(text)
    )
    return html.encode()


@cache
def _layout() -> Template:
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("layout.html")


@cache
def _markdown() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": True}).enable("table")


def _page(path: str, html: bytes, modified: datetime) -> SitePage:
    return SitePage(path, html, f'"{hashlib.sha256(html).hexdigest()[:20]}"', modified)


def _published(path: str) -> datetime:
    """Some minute of the first version's launch, always the same one for the same page."""
    return _FIRST_PUBLISHED + timedelta(minutes=int(hashlib.sha256(path.encode()).hexdigest()[:4], 16) % 480)
