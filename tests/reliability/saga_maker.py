"""Random canvases with sagas, told as JSON (``tests.apps.random_sagas`` makes signatures of them), and their leaves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Part = dict[str, Any]
Path = tuple[tuple[int, bool], ...]

#: The kinds of steps, and how often each is made.  Those with a compensation, and what the others are.
STEPS = {
    "do": 24, "book": 12, "stall": 9, "tried": 8, "few": 8, "trade": 8, "doze": 6, "note": 5, "plain": 5, "mail": 3,
    "send": 3, "pay": 4, "buy": 3, "wait": 8, "sleep": 4,
}  # fmt: skip
ITEMS = {"do": 4, "book": 2, "tried": 1, "few": 2, "trade": 1, "doze": 1, "note": 1, "sub": 1, "mail": 1, "send": 1}
UNDOABLE = frozenset({"do", "book", "stall", "tried", "few", "trade", "doze", "buy", "send"})
#: Whether they took effect can be asked.
ASKED = frozenset({"book", "stall"})
PIVOTS = frozenset({"pay", "buy"})
RETRIABLE = frozenset({"mail", "send"})
#: How a wait for a signal ends: by one sent before it begins, or after; in its time, by a default or not; or by either.
MODES = {"early": 2, "late": 3, "default": 2, "race": 2, "lost": 1}
_PARTS = {"step": 10, "chain": 2, "group": 4, "chord": 2, "saga": 5, "each": 2, "sub": 2}
_DEEPEST, _MOST_LEAVES, _MOST_WITHIN = 3, 14, 2


@dataclass(frozen=True)
class Leaf:
    """A step of a canvas, and where it stands.

    ``path``: places in sequences and groups, each with whether it is a sequence.  ``sagas``: where those around it
    begin, the outermost first.  An each and a workflow within are leaves as well, and so is each item of an each.
    """

    part: Part
    path: Path
    sagas: tuple[Path, ...]
    item_of: Leaf | None = None

    @property
    def name(self) -> str:
        return str(self.part["name"])

    @property
    def kind(self) -> str:
        return str(self.part["kind"])

    @property
    def undoable(self) -> bool:
        return self.kind in UNDOABLE

    @property
    def pivot(self) -> bool:
        return self.kind in PIVOTS

    @property
    def retriable(self) -> bool:
        return self.kind in RETRIABLE or self.part.get("task") in RETRIABLE

    def comes_before(self, other: Leaf) -> bool:
        """Tell whether the other one starts only after this one is done."""
        for (here, sequence), (there, _) in zip(self.path, other.path, strict=False):
            if here != there:
                return sequence and here < there
        return False


def leaves_of(part: Part, path: Path = (), sagas: tuple[Path, ...] = ()) -> Iterator[Leaf]:
    """Yield the leaves of a canvas that stands at ``path``, but for its sleeps, which nothing tells apart."""
    kind = part["kind"]
    if kind in ("chain", "saga"):
        around = (*sagas, path) if kind == "saga" else sagas
        for place, one in enumerate(part["parts"]):
            yield from leaves_of(one, (*path, (place, True)), around)
    elif kind in ("group", "chord"):
        header = path if kind == "group" else (*path, (0, True))
        for place, one in enumerate(part["parts"]):
            yield from leaves_of(one, (*header, (place, False)), sagas)
        if kind == "chord":
            yield from leaves_of(part["body"], (*path, (1, True)), sagas)
    elif kind != "sleep":
        leaf = Leaf(part, path, sagas)
        yield leaf
        for place, item in enumerate(part.get("items", ())):
            yield Leaf(item, (*path, (place, False)), sagas, item_of=leaf)


def all_leaves_of(part: Part) -> Iterator[Leaf]:
    """Yield the leaves of a canvas, and of the workflows within it."""
    for leaf in leaves_of(part):
        yield leaf
        if leaf.kind == "sub":
            yield from all_leaves_of(leaf.part["canvas"])


class Maker:
    """Makes one random canvas; the same for the same ``rng``.  ``within``: how many workflows are around it."""

    def __init__(self, rng: random.Random, name: str, *, within: int = 0) -> None:
        self.rng, self.name, self.within = rng, name, within
        self.made = 0

    def canvas(self) -> Part:
        """Return a canvas of a few steps."""
        return self._saga(0) if self.rng.random() < 0.25 else {"kind": "chain", "parts": self._parts(0)}

    def _parts(self, depth: int, least: int = 1) -> list[Part]:
        return [self._part(depth + 1) for _ in range(self.rng.randint(least, 3))]

    def _part(self, depth: int) -> Part:
        kind = self._one_of(_PARTS)
        if depth >= _DEEPEST or self.made >= _MOST_LEAVES or (kind == "sub" and self.within == _MOST_WITHIN):
            kind = "step"
        match kind:
            case "step":
                return self._step(self._one_of(STEPS))
            case "each":
                return self._each()
            case "sub":
                return self._sub()
            case "saga":
                return self._saga(depth)
            case "chord":
                return {"kind": kind, "parts": self._parts(depth, 2), "body": self._part(depth + 1)}
            case "group" if self.rng.random() < 0.3:
                return self._saga_beside_a_pivot()
        return {"kind": kind, "parts": self._parts(depth, 2 if kind == "group" else 1)}

    def _saga(self, depth: int) -> Part:
        parts = self._parts(depth)
        if self.rng.random() < 0.25:
            parts.append(self._step(self.rng.choice(["do", "stall"]), fragile=1.0))  # so that something is undone
        return {"kind": "saga", "parts": parts}

    def _saga_beside_a_pivot(self) -> Part:
        """Return a saga that undoes itself, most likely while a pivot beside it runs."""
        saga = {"kind": "saga", "parts": [self._step("do", fragile=0.0), self._step("note", fragile=1.0)]}
        pivot = {**self._step("pay", fragile=0.0), "slow": 3.0}
        return {"kind": "group", "parts": [saga, pivot]}

    def _each(self) -> Part:
        name, kind = self._name(), self._one_of(ITEMS)
        if self.within == _MOST_WITHIN and kind == "sub":
            kind = "do"
        items = [
            self._sub() if kind == "sub" else self._step(kind, fragile=0.12) for _ in range(self.rng.randint(1, 4))
        ]
        limit, tolerate = self.rng.randint(1, 3), self.rng.choice([0, 0, 1])
        results = self.rng.random() < 0.7
        return {
            "kind": "each", "name": name, "task": kind, "items": items, "limit": limit, "tolerate": tolerate,
            "results": results,
        }  # fmt: skip

    def _sub(self) -> Part:
        name = self._name()
        maker = Maker(self.rng, f"{name}/", within=self.within + 1)
        maker.made = max(self.made, _MOST_LEAVES - 4)
        return {"kind": "sub", "name": name, "canvas": maker.canvas()}

    def _step(self, kind: str, *, fragile: float = 0.1) -> Part:
        if kind == "sleep":
            return {"kind": kind, "seconds": self.rng.choice([0.05, 0.2, 0.5])}
        name = self._name()
        if kind == "wait":
            return self._wait(name)
        rng = self.rng
        fragile = max(fragile, 0.8) if kind == "stall" else fragile
        return {
            "kind": kind,
            "name": name,
            "slow": rng.choice([0.3, 1.0] if kind in PIVOTS else [0.0, 0.1, 0.3]),  # a pivot may be the last to end
            "failures": rng.choice([0, 0, 0, 1]),
            "breaks": kind != "book" and rng.random() < fragile,
            "undo_failures": rng.choice([0, 0, 1]),
            "undo_breaks": kind not in ASKED and rng.random() < 0.1,
            "fails_at": rng.choice(["sell", "buy"]),
            "asks": rng.random() < 0.5,
            "policy": kind != "stall" and rng.random() < 0.2,
        }

    def _wait(self, name: str) -> Part:
        mode = self._one_of(MODES)
        if mode == "early" and self.within:
            mode = "late"  # nobody knows that run before it has begun
        part: Part = {"kind": "wait", "name": name, "mode": mode, "timeout": None}
        if mode not in ("early", "late"):
            part["timeout"] = 0.3
        if mode in ("default", "race"):
            part["default"] = {"nobody": name}
        return part

    def _name(self) -> str:
        self.made += 1
        return f"{self.name}{self.made}"

    def _one_of(self, weights: dict[str, int]) -> str:
        return self.rng.choices(list(weights), list(weights.values()))[0]
