"""The report: self-contained, safe against what pages hold, and right in its numbers."""

import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from uuid import uuid4

import pytest

from tasks.compare import Block, ChangeKind, Document, compare, whole
from tasks.report import Report, _amount, build_report
from tasks.store import CapturedPage, CheckSummary, Competitor, FoundChange

BASE = "https://corvane.example"
NASTY = '<script>alert("x")</script>'


class Balance(HTMLParser):
    """Checks that each element that is opened is closed, in order."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def document(*texts: str) -> Document:
    return Document(texts[0], (Block("heading", texts[0]), *(Block("text", text) for text in texts[1:])))


def report(changes: list[FoundChange], captured: list[CapturedPage] | None = None, *, first: bool = False) -> Report:
    previous = None if first else datetime(2026, 11, 16, tzinfo=UTC)
    started = datetime(2026, 11, 23, 9, 5, tzinfo=UTC)
    return build_report(
        CheckSummary(Competitor(1, "Corvane", BASE), uuid4(), started, previous, 2), captured or [], changes
    )


def edited(path: str, before: Document, after: Document) -> FoundChange:
    comparison = compare(before, after)
    assert comparison is not None
    detail = {"title": after.title, **comparison.to_json()}
    return FoundChange(BASE + path, after.title, str(comparison.kind), comparison.similarity, detail)


def removed(path: str, before: Document) -> FoundChange:
    detail = {"title": before.title, **whole(before, ChangeKind.REMOVED).to_json()}
    return FoundChange(BASE + path, before.title, "removed", 0.0, detail)


def full() -> Report:
    return report(
        [
            edited("/pricing", document("Pricing", "Pay $49 a month"), document("Pricing", "Pay $59 a month")),
            edited("/blog/a", document("A", "Some old words here"), document("A", "Some new words here")),
            removed("/blog/b", document("B", "Bye")),
        ],
        [
            CapturedPage(f"{BASE}/pricing", "Pricing", 200, None, "price"),
            CapturedPage(f"{BASE}/blog/a", "A", 200, None, "edited"),
            CapturedPage(f"{BASE}/", "Home", 304, None, None),
            CapturedPage(f"{BASE}/broken", "", None, "it answered 403", None),
        ],
    )


def test_numbers_are_right_in_the_summary_and_on_the_page() -> None:
    found = full()
    assert found.summary["pages"] == {"captured": 3, "unchanged": 1, "failed": 1, "disallowed": 2}
    assert found.summary["changes"] == {"price": 1, "edited": 1, "added": 0, "removed": 1}
    headline = "1 page changed its prices, 1 was edited and 1 disappeared."
    assert headline in found.html
    assert found.text.startswith(headline)
    assert "/pricing: $49 → $59" in found.text
    assert "20 %" in found.html
    assert "it answered 403" in found.html
    assert "<del>$49</del>" in found.html
    assert "<ins>$59</ins>" in found.html


def test_it_is_one_file_of_sound_html() -> None:
    parser = Balance()
    parser.feed(full().html)
    assert parser.open == []
    assert parser.seen & {"script", "img", "link", "iframe", "object"} == set()
    assert not re.search(r"url\(|@import|javascript:", full().html)


def test_what_pages_hold_stays_text() -> None:
    found = report(
        [edited(f"/{NASTY}", document(NASTY, "one"), document(NASTY, NASTY)), removed("/x", document(NASTY, NASTY))],
        [CapturedPage(f"{BASE}/{NASTY}", NASTY, 200, NASTY, "edited")],
    )
    assert "<script" not in found.html
    assert "&lt;script&gt;" in found.html


def test_a_first_look_and_a_quiet_one() -> None:
    captured = [CapturedPage(f"{BASE}/", "Home", 200, None, None)]
    assert "A first look at Corvane: 1 page on record" in report([], captured, first=True).html
    assert "Nothing changed at Corvane: all 1 page read as before." in report([], captured).html


def test_long_stretches_that_did_not_change_are_shortened() -> None:
    long = "word " * 400
    html = report([edited("/a", document("A", f"{long} old {long}"), document("A", f"{long} new {long}"))]).html
    assert html.count("word") < 100
    assert "…" in html
    assert "<del>old</del>" in html


@pytest.mark.parametrize(
    "text, amount",
    [
        ("$2,400", 2400),
        ("$2.50", 2.5),
        ("9,50 €", 9.5),
        ("€1.200,50", 1200.5),
        ("EUR 10", 10),
        ("$1,000,000", 1_000_000),
        ("", None),
        (None, None),
    ],
)
def test_amounts(text: str | None, amount: float | None) -> None:
    assert _amount(text) == amount
