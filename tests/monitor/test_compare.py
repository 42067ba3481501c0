"""What a person would call a change is one, and nothing else is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.compare import Block, ChangeKind, Comparison, Document, PriceChange, compare, describe_file, extract, whole
from tasks.rival import Change, expected_changes, load_site


def page(*paragraphs: str, menu: str = "Home", footer: str = "© 2026") -> str:
    body = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    return (
        f"<!doctype html><html><head><title>t</title></head><body><header><nav><a href=/>{menu}</a></nav></header>"
        f"<main><article><h1>Plans</h1>{body}</article></main><footer>{footer}</footer></body></html>"
    )


def text_of(comparison: Comparison, side: str) -> list[str]:
    return [piece.text for hunk in comparison.hunks for piece in hunk.pieces if piece.side == side]


def document(*texts: str) -> Document:
    return Document("t", tuple(Block("text", text) for text in texts))


def test_the_whole_site_is_judged_as_its_list_of_edits_says() -> None:
    first, second = load_site(1).pages, load_site(2).pages
    found = {}
    for path in first.keys() & second.keys():
        comparison = compare(extract(first[path].html), extract(second[path].html))
        if comparison is not None:
            found[path] = str(comparison.kind)
    wanted = {path: str(kind) for path, kind in expected_changes().items() if kind in {Change.EDITED, Change.PRICE}}
    assert found == wanted


def test_menus_and_footers_are_no_content() -> None:
    long = "Events are kept for a year, and every plan has as many seats as a team may ever need in practice. " * 3
    before, after = page(long), page(long, menu="Home and a new link", footer="© 2027, build 9")
    assert compare(extract(before), extract(after)) is None


def test_the_structure_of_a_page_is_kept() -> None:
    html = (
        "<main><article><h1>Limits</h1><p>What we  allow,\nand&nbsp;why.</p>"
        "<ul><li>One</li><li>Two <b>bold</b></li></ul>"
        "<table><tr><th>What</th><th>Limit</th></tr><tr><td>Size</td><td>32 kB</td></tr></table>"
        "<pre><code>curl example</code></pre></article></main>"
    )
    assert extract(f"<html><body>{html}</body></html>").blocks == (
        Block("heading", "Limits"),
        Block("text", "What we allow, and why."),
        Block("item", "One"),
        Block("item", "Two bold"),
        Block("row", "What · Limit"),
        Block("row", "Size · 32 kB"),
        Block("code", "curl example"),
    )


@pytest.mark.parametrize(
    "html", ["", "<html></html>", "just words", "<p>short", "\0<p>nul\0", b"\xff\xfe\x00", "<" * 50]
)
def test_anything_gives_a_document(html: str | bytes) -> None:
    found = extract(html)
    assert "\0" not in str(found.to_json())
    assert Document.from_json(found.to_json()) == found


def test_a_price_is_named_by_its_heading() -> None:
    before = Document("Plans", (Block("heading", "Team"), Block("text", "$1,049 per month")))
    after = Document("Plans", (Block("heading", "Team"), Block("text", "$1,059.50 per month")))
    comparison = compare(before, after)
    assert comparison is not None
    assert comparison.kind is ChangeKind.PRICE
    assert comparison.prices == (PriceChange("Team", "$1,049", "$1,059.50"),)
    assert text_of(comparison, "old") == ["$1,049"]
    assert text_of(comparison, "new") == ["$1,059.50"]


@pytest.mark.parametrize(
    "old, new, change",
    [
        ("$0", "Free", ("$0", None)),
        ("From 49 € a month", "From 59 € a month", ("49 €", "59 €")),
        ("EUR 10 each", "EUR 12 each", ("EUR 10", "EUR 12")),
        ("£5", "£7.50", ("£5", "£7.50")),
    ],
)
def test_prices_in_several_forms(old: str, new: str, change: tuple[str | None, str | None]) -> None:
    comparison = compare(document(old), document(new))
    assert comparison is not None
    assert [(price.old, price.new) for price in comparison.prices] == [change]


def test_an_amount_that_only_moved_is_no_price_change() -> None:
    comparison = compare(document("Pay $5 now and $7 later"), document("Pay $7 later and $5 right now"))
    assert comparison is not None
    assert comparison.kind is ChangeKind.EDITED


def test_only_the_words_that_changed_are_marked() -> None:
    comparison = compare(
        document("Refunds reach your card within ten days.", "Same."),
        document("Refunds reach your card within five days, we promise.", "Same."),
    )
    assert comparison is not None
    assert text_of(comparison, "old") == ["ten"]
    assert text_of(comparison, "new") == ["five", ", we promise"]
    assert 0.6 < comparison.similarity < 1


def test_blocks_that_have_nothing_in_common_are_not_paired() -> None:
    before = document("Our office is at the harbour in the old town of Rotterdam.")
    after = document("Analytics never slept so well since nobody had to look twice.")
    comparison = compare(before, after)
    assert comparison is not None
    assert [hunk.change for hunk in comparison.hunks] == ["removed", "added"]


def test_a_file_is_compared_as_a_whole() -> None:
    first, second = describe_file("application/pdf", b"1"), describe_file("application/pdf", b"2")
    assert compare(first, first) is None
    assert compare(first, second) is not None


def test_a_page_that_came_or_went_shows_all_its_text() -> None:
    added = whole(document("One", "Two"), ChangeKind.ADDED)
    assert text_of(added, "new") == ["One", "Two"]
    removed = whole(document("One", "Two"), ChangeKind.REMOVED)
    assert text_of(removed, "old") == ["One", "Two"]


blocks = st.lists(
    st.builds(Block, st.sampled_from(["text", "item", "heading"]), st.text("ab $19.,", min_size=1, max_size=12)),
    max_size=6,
)


@given(blocks, blocks)
def test_both_versions_can_be_read_off_the_comparison(old: list[Block], new: list[Block]) -> None:
    before, after = Document("", tuple(old)), Document("", tuple(new))
    comparison = compare(before, after)
    if comparison is None:
        assert old == new
        return

    def lines(side: str, skip: str) -> list[str]:
        changed = [hunk for hunk in comparison.hunks if hunk.change != skip]
        return ["".join(piece.text for piece in hunk.pieces if piece.side in {"same", side}) for hunk in changed]

    def contains(whole: list[Block], part: list[str]) -> bool:
        rest: Any = iter([block.text for block in whole])
        return all(line in rest for line in part)

    assert contains(old, lines("old", "added"))
    assert contains(new, lines("new", "removed"))
    assert len(old) - len(lines("old", "added")) == len(new) - len(lines("new", "removed"))
    assert 0 <= comparison.similarity <= 1
