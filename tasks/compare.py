"""From HTML to text, and from two texts to what changed between them. Pure: no I/O.

Extraction is trafilatura's: it leaves navigation, footers and banners out, so that a new link in a menu does not make
every page look edited. Comparison is difflib's, first on blocks (headings, paragraphs, rows), then on words.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from enum import StrEnum
from functools import cached_property
from itertools import zip_longest
from typing import Any, Self

import trafilatura


class ChangeKind(StrEnum):
    ADDED = "added"
    REMOVED = "removed"
    EDITED = "edited"
    PRICE = "price"


@dataclass(frozen=True)
class Block:
    """A paragraph, a heading, a list item, a table's row, a quotation or a piece of code."""

    kind: str
    text: str


@dataclass(frozen=True)
class Document:
    """The readable part of a page."""

    title: str
    blocks: tuple[Block, ...]

    @cached_property
    def sha256(self) -> str:
        """Names the content: equal documents have equal names."""
        return hashlib.sha256(json.dumps(self.to_json(), ensure_ascii=False, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"title": self.title, "blocks": [[block.kind, block.text] for block in self.blocks]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(value["title"], tuple(Block(kind, text) for kind, text in value["blocks"]))


@dataclass(frozen=True)
class Piece:
    """A stretch of words that was kept (`same`), taken out (`old`) or put in (`new`)."""

    side: str
    text: str


@dataclass(frozen=True)
class Hunk:
    """One changed block, under the heading where it stands."""

    change: str
    """`added`, `removed` or `edited`."""
    block: str
    heading: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class PriceChange:
    label: str
    """The heading above the price, most often a plan's name."""
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Comparison:
    kind: ChangeKind
    similarity: float
    """Share of words that both versions have in common and in order, from 0 to 1."""
    hunks: tuple[Hunk, ...]
    prices: tuple[PriceChange, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def extract(html: bytes | str) -> Document:
    """The readable text of a page; a page without any gives a document without blocks."""
    found = trafilatura.bare_extraction(
        html, favor_recall=True, include_tables=True, include_comments=False, with_metadata=False
    )
    body = getattr(found, "body", None)
    blocks = tuple(_blocks(body)) if body is not None else ()
    if not blocks:  # too short for trafilatura's heuristics: take all the text there is
        lines = (_clean(line) for line in trafilatura.html2txt(html).splitlines())
        blocks = tuple(Block("text", line) for line in lines if line)
    headings = (block.text for block in blocks if block.kind == "heading")
    return Document(next(headings, blocks[0].text[:120] if blocks else ""), blocks)


def describe_file(content_type: str, body: bytes) -> Document:
    """Stands for what is not HTML, such as a PDF: compared as a whole."""
    digest = hashlib.sha256(body).hexdigest()
    return Document(content_type, (Block("file", f"{content_type}, {len(body):,} bytes, SHA-256 {digest}"),))


def compare(old: Document, new: Document) -> Comparison | None:
    """What changed in a page; None when its readable text is the same."""
    if old.blocks == new.blocks:
        return None
    hunks = tuple(_hunks(old.blocks, new.blocks))
    prices = tuple(price for hunk in hunks for price in _price_changes(hunk))
    kind = ChangeKind.PRICE if prices else ChangeKind.EDITED
    return Comparison(kind, _similarity(old, new), hunks, prices)


def whole(document: Document, kind: ChangeKind) -> Comparison:
    """A page that came or went as a whole."""
    side = "new" if kind is ChangeKind.ADDED else "old"
    hunks = tuple(
        Hunk(str(kind), block.kind, heading, (Piece(side, block.text),))
        for block, heading in zip(document.blocks, _headings(document.blocks), strict=True)
    )
    return Comparison(kind, 0.0, hunks, ())


# ------------------------------------------------------------------------------------------------- extraction

_BLOCKS = {"head": "heading", "p": "text", "item": "item", "row": "row", "quote": "quote", "code": "code"}
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))


def _blocks(element: Any) -> Iterator[Block]:
    """Walk trafilatura's tree in order, one block for each element that stands on its own line."""
    for child in element:
        if not isinstance(child.tag, str):  # a comment
            continue
        kind = _BLOCKS.get(child.tag)
        if kind == "row":
            text = " · ".join(_clean("".join(cell.itertext())) for cell in child.iterchildren("cell"))
        elif kind == "quote" or (kind == "item" and child.find(".//list") is not None) or kind is None:
            own = _clean(child.text or "")
            if own:
                yield Block(kind or "text", own)
            yield from _blocks(child)
            text = ""
        else:
            text = _clean("".join(child.itertext()))
        if text.strip(" ·"):
            yield Block(kind or "text", text)
        if element.tag in {"body", "quote"} and (tail := _clean(child.tail or "")):
            yield Block("text", tail)


def _clean(text: str) -> str:
    """One line in a normal form; control characters, which Postgres would refuse, and invisible ones go."""
    text = unicodedata.normalize("NFC", text).translate(_INVISIBLE)
    return " ".join("".join(" " if unicodedata.category(sign) == "Cc" else sign for sign in text).split())


# ------------------------------------------------------------------------------------------------- comparison

_AMOUNT = r"(?:[$€£¥]|\b(?:USD|EUR|GBP)\s?)\d[\d,.]*\d|(?:[$€£¥]|\b(?:USD|EUR|GBP)\s?)\d|\d[\d,.]*\s?(?:€|EUR\b|USD\b)"
_PRICE = re.compile(_AMOUNT)
_WORD = re.compile(rf"{_AMOUNT}|\w+(?:[.,'’]\w+)*|\s+|[^\w\s]")
_ALIKE = 0.5
_MOST_PAIRS = 2_500


def _hunks(old: Sequence[Block], new: Sequence[Block]) -> Iterator[Hunk]:
    old_headings, new_headings = _headings(old), _headings(new)
    for tag, old_from, old_to, new_from, new_to in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        for before, after in _pair(old, new, range(old_from, old_to), range(new_from, new_to)):
            if before is None and after is not None:
                pieces: tuple[Piece, ...] = (Piece("new", new[after].text),)
                yield Hunk("added", new[after].kind, new_headings[after], pieces)
            elif after is None and before is not None:
                yield Hunk("removed", old[before].kind, old_headings[before], (Piece("old", old[before].text),))
            elif before is not None and after is not None:
                pieces = _word_diff(old[before].text, new[after].text)
                yield Hunk("edited", new[after].kind, new_headings[after], pieces)


def _pair(
    old: Sequence[Block], new: Sequence[Block], before: range, after: range
) -> Iterator[tuple[int | None, int | None]]:
    """Match the blocks of a replaced stretch with those that replace them, in order."""
    if len(before) == len(after) == 1 and _short(old[before[0]]) and _short(new[after[0]]):
        yield before[0], after[0]  # "$0" became "Free": nothing alike, and yet an edit
        return
    best = _most_alike(old, new, before, after)
    if best is None:
        yield from ((index, None) for index in before)
        yield from ((None, index) for index in after)
        return
    left, right = best
    yield from _pair(old, new, range(before.start, left), range(after.start, right))
    yield left, right
    yield from _pair(old, new, range(left + 1, before.stop), range(right + 1, after.stop))


def _most_alike(old: Sequence[Block], new: Sequence[Block], before: range, after: range) -> tuple[int, int] | None:
    if not before or not after:
        return None
    if len(before) * len(after) > _MOST_PAIRS:  # a rewritten page: which block became which no longer matters
        return None
    score, best = 0.0, None
    for left in before:
        for right in after:
            if old[left].kind != new[right].kind:
                continue
            matcher = SequenceMatcher(None, _terms(old[left].text), _terms(new[right].text), autojunk=False)
            floor = max(score, _ALIKE)
            if matcher.real_quick_ratio() >= floor and matcher.quick_ratio() >= floor:
                ratio = matcher.ratio()
                if ratio >= _ALIKE and ratio > score:
                    score, best = ratio, (left, right)
    return best


def _word_diff(old: str, new: str) -> tuple[Piece, ...]:
    before, after = _words(old), _words(new)
    pieces: list[Piece] = []
    for tag, old_from, old_to, new_from, new_to in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            pieces.append(Piece("same", "".join(before[old_from:old_to])))
            continue
        pieces.extend(
            piece
            for piece in (
                Piece("old", "".join(before[old_from:old_to])),
                Piece("new", "".join(after[new_from:new_to])),
            )
            if piece.text
        )
    return tuple(_joined(pieces))


def _joined(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Let one change swallow the lone space between two: "a b" to "c d" reads better than four scraps."""
    old = new = ""
    for index, piece in enumerate(pieces):
        bridge = piece.side == "same" and not piece.text.strip() and 0 < index < len(pieces) - 1
        if piece.side == "same" and not bridge:
            yield from (Piece(side, text) for side, text in (("old", old), ("new", new)) if text)
            old = new = ""
            yield piece
        else:
            old += piece.text if piece.side != "new" else ""
            new += piece.text if piece.side != "old" else ""
    yield from (Piece(side, text) for side, text in (("old", old), ("new", new)) if text)


def _price_changes(hunk: Hunk) -> Iterator[PriceChange]:
    if hunk.change != "edited":
        return
    before = _PRICE.findall("".join(piece.text for piece in hunk.pieces if piece.side != "new"))
    after = _PRICE.findall("".join(piece.text for piece in hunk.pieces if piece.side != "old"))
    gone = (Counter(before) - Counter(after)).elements()
    came = (Counter(after) - Counter(before)).elements()
    for old, new in zip_longest(gone, came):
        yield PriceChange(hunk.heading, old, new)


def _headings(blocks: Sequence[Block]) -> list[str]:
    """For each block the heading under which it stands."""
    headings, current = [], ""
    for block in blocks:
        if block.kind == "heading":
            current = block.text
        headings.append(current)
    return headings


def _similarity(old: Document, new: Document) -> float:
    before, after = ([word for block in side.blocks for word in block.text.split()] for side in (old, new))
    if not before and not after:
        return 1.0
    return SequenceMatcher(None, before, after, autojunk=False).ratio()


def _short(block: Block) -> bool:
    return block.kind == "text" and len(_terms(block.text)) <= 6


def _terms(text: str) -> list[str]:
    """The words that bear meaning: two rows are not alike because both have three separators."""
    return [word for word in _words(text) if word[0].isalnum() or len(word) > 1]


def _words(text: str) -> list[str]:
    return _WORD.findall(text)
