"""Turns a check into a report: one HTML file that needs nothing else, and a summary for machines. Pure: no I/O."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks.compare import ChangeKind
from tasks.store import CapturedPage, CheckSummary, FoundChange

KINDS = (ChangeKind.PRICE, ChangeKind.EDITED, ChangeKind.ADDED, ChangeKind.REMOVED)
_CONTEXT = 90
_EXCERPT = 3


@dataclass(frozen=True)
class Report:
    summary: Mapping[str, Any]
    """JSON: what a webhook receives."""
    html: str
    text: str
    """A few lines, for the body of a mail."""


@dataclass(frozen=True)
class _PriceRow:
    title: str
    label: str
    """The heading above the price; empty where that is the page's title."""
    path: str
    anchor: str
    old: str | None
    new: str | None
    percent: float | None


@dataclass(frozen=True)
class _ChangeCard:
    anchor: str
    url: str
    path: str
    title: str
    kind: ChangeKind
    section: str
    similarity: float
    groups: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    """Heading, and the hunks below it."""
    more: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
    """What is folded away at first."""


def build_report(check: CheckSummary, captured: Sequence[CapturedPage], changes: Sequence[FoundChange]) -> Report:
    """`captured`: every page that the check set out to capture; `changes`: what it found, removed pages included."""
    sections = _sections([page.url for page in captured] + [change.url for change in changes])
    cards = _cards(changes, sections)
    counts = {kind: sum(change.kind == kind for change in changes) for kind in KINDS}
    failed = [page for page in captured if page.status is None]
    read = [page for page in captured if page.status is not None]
    unchanged = sum(page.change is None for page in read)
    prices = list(_price_rows(cards, changes))
    summary = {
        "run_id": str(check.run_id),
        "competitor": {"id": check.competitor.id, "name": check.competitor.name, "url": check.competitor.base_url},
        "started_at": check.started_at.isoformat(),
        "first": check.previous_at is None,
        "pages": {"captured": len(read), "unchanged": unchanged, "failed": len(failed), "disallowed": check.disallowed},
        "changes": {str(kind): count for kind, count in counts.items()},
        "prices": [
            {"page": row.path, "label": row.label or row.title, "old": row.old, "new": row.new} for row in prices
        ],
        "changed_pages": [{"url": card.url, "title": card.title, "kind": str(card.kind)} for card in cards],
    }
    headline = _headline(check, counts, len(read))
    html = _template().render(
        check=check,
        headline=headline,
        counts=counts,
        kinds=KINDS,
        read=read,
        failed=failed,
        unchanged=unchanged,
        not_modified=sum(page.status == 304 for page in read),
        prices=prices,
        cards={kind: [card for card in cards if card.kind is kind] for kind in KINDS},
        sections=_by_section(captured, sections),
        path=_path,
    )
    text = "\n".join(
        [
            headline,
            "",
            *(f"{row.path} {row.label}".rstrip() + f": {row.old or '–'} → {row.new or '–'}" for row in prices),
        ]
    )
    return Report(summary, html, text.strip() + "\n")


def _headline(check: CheckSummary, counts: Mapping[ChangeKind, int], read: int) -> str:
    name = check.competitor.name
    if check.previous_at is None:
        return f"A first look at {name}: {_number(read, 'page')} on record. From now on, changes show up here."
    price, edited = counts[ChangeKind.PRICE], counts[ChangeKind.EDITED]
    phrases = [
        f"{_number(price, 'page')} changed {'its' if price == 1 else 'their'} prices",
        f"{edited} {'was' if edited == 1 else 'were'} edited",
        f"{counts[ChangeKind.ADDED]} appeared",
        f"{counts[ChangeKind.REMOVED]} disappeared",
    ]
    said = [phrase for phrase, kind in zip(phrases, KINDS, strict=True) if counts[kind]]
    if not said:
        return f"Nothing changed at {name}: all {_number(read, 'page')} read as before."
    return (", ".join(said[:-1]) + " and " if said[1:] else "") + said[-1] + "."


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


# ------------------------------------------------------------------------------------------------- cards


def _cards(changes: Sequence[FoundChange], sections: Mapping[str, str]) -> list[_ChangeCard]:
    ordered = sorted(changes, key=lambda change: (KINDS.index(ChangeKind(change.kind)), change.url))
    return [_card(number, change, sections) for number, change in enumerate(ordered, 1)]


def _card(number: int, change: FoundChange, sections: Mapping[str, str]) -> _ChangeCard:
    kind = ChangeKind(change.kind)
    hunks = [hunk for hunk in change.detail["hunks"] if hunk["pieces"]]
    shown = hunks
    if kind in {ChangeKind.ADDED, ChangeKind.REMOVED}:
        hunks = [hunk for hunk in hunks if hunk["pieces"][0]["text"] != change.title]  # stands in the card's head
        shown = hunks[:_EXCERPT]
    return _ChangeCard(
        anchor=f"change-{number}",
        url=change.url,
        path=_path(change.url),
        title=change.title,
        kind=kind,
        section=sections[change.url],
        similarity=change.similarity,
        groups=list(_grouped(shown, change.title)),
        more=list(_grouped(hunks[len(shown) :], change.title)),
    )


def _grouped(hunks: Sequence[Mapping[str, Any]], title: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Hunks under their headings; the page's own title is not repeated."""
    heading, shown, group = "", "", list[dict[str, Any]]()
    for hunk in hunks:
        text = "".join(piece["text"] for piece in hunk["pieces"])
        under = "" if hunk["heading"] == title or hunk["block"] == "heading" else hunk["heading"]
        if group and under not in {heading, shown}:
            yield heading, group
            heading, shown, group = "", "", []
        if not group:
            heading = under
        if hunk["block"] == "heading":
            shown = text
        pieces = _shortened(hunk["pieces"])
        group.append({"change": hunk["change"], "block": hunk["block"], "pieces": pieces, "text": text})
    if group:
        yield heading, group


def _shortened(pieces: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Long stretches that did not change give way to a few words on each side of what did."""
    shortened = []
    for index, piece in enumerate(pieces):
        text = piece["text"]
        if piece["side"] == "same" and len(text) > 3 * _CONTEXT:
            before = "" if index == 0 else text[:_CONTEXT].rpartition(" ")[0]
            after = "" if index == len(pieces) - 1 else text[-_CONTEXT:].partition(" ")[2]
            text = f"{before} … {after}"
        shortened.append({"side": piece["side"], "text": text})
    return shortened


def _price_rows(cards: Sequence[_ChangeCard], changes: Sequence[FoundChange]) -> Iterator[_PriceRow]:
    details = {change.url: change.detail for change in changes}
    for card in cards:
        for price in details[card.url]["prices"]:
            old, new = _amount(price["old"]), _amount(price["new"])
            percent = 100 * (new - old) / old if old and new is not None else None
            label = "" if price["label"] == card.title else price["label"]
            yield _PriceRow(card.title, label, card.path, card.anchor, price["old"], price["new"], percent)


def _amount(text: str | None) -> float | None:
    """2400.0 for "$2,400", 9.5 for "9,50 €"."""
    digits = re.sub(r"[^\d.,]", "", text or "").strip(".,")
    if not digits:
        return None
    whole, separator, cents = re.fullmatch(r"(.*?)(?:([.,])(\d{1,2}))?", digits, re.DOTALL).groups()  # type: ignore[union-attr]
    return float(re.sub(r"[.,]", "", whole) + (f".{cents}" if separator else ""))


# ------------------------------------------------------------------------------------------------- sections


def _path(url: str) -> str:
    return urlsplit(url).path or "/"


def _sections(urls: Sequence[str]) -> dict[str, str]:
    """Each page's section: the first part of its path, where several pages share it."""
    first = {url: _path(url).strip("/").partition("/")[0] for url in urls}
    sizes = Counter(first[url] for url in set(urls))
    return {
        url: part.replace("-", " ").replace("_", " ").capitalize() if part and sizes[part] > 1 else "Site"
        for url, part in first.items()
    }


def _by_section(
    captured: Sequence[CapturedPage], sections: Mapping[str, str]
) -> list[tuple[str, list[CapturedPage], int]]:
    """Section, its pages and how many of them changed; the liveliest first."""
    groups: dict[str, list[CapturedPage]] = {}
    for page in captured:
        groups.setdefault(sections[page.url], []).append(page)
    counted = [(name, pages, sum(page.change is not None for page in pages)) for name, pages in groups.items()]
    return sorted(counted, key=lambda group: (-group[2], group[0]))


# ------------------------------------------------------------------------------------------------- rendering


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["moment"] = _moment
    return environment.get_template("report.html")


def _moment(value: datetime) -> str:
    return f"{value.day} {value:%B %Y, %H:%M} UTC"
