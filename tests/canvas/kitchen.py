"""Random canvases, as recipes: many of them from a seed, or one by one from hypothesis, which shrinks them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import strategies as st

from tests.canvas.recipes import Recipe, labelled

_VALUES: tuple[Any, ...] = (0, 1, -2.5, "a", "é ", None, True, [], [1, [2]], {"k": {"v": 1}})


@dataclass(frozen=True)
class Menu:
    """What may come up: failing tasks; tasks that retry, replace themselves or extend their chord; callbacks."""

    failing: bool = True
    running: bool = True
    links: bool = True
    #: What means one thing to Celery's eager mode and another to its workers (docs/canvas.md has a row for each):
    #: chains that are not folded when they are made, groups of one, groups directly in groups.
    unfolded: bool = True
    lone: bool = True
    stacked: bool = True
    #: Seconds for ``countdown``, where a worker has to wait for it.
    countdown: float = 0.05


def canvases(menu: Menu) -> st.SearchStrategy[Recipe]:
    """Return a strategy that shrinks to few, simple parts."""
    return st.randoms(use_true_random=False).map(lambda rng: cook(rng, menu))


def sample(menu: Menu, count: int, *, seed: int) -> list[Recipe]:
    """Return ``count`` different recipes, the same ones every time."""
    rng = Random(seed)
    found: dict[str, Recipe] = {}
    while len(found) < count:
        recipe = cook(rng, menu)
        found[json.dumps(recipe)] = recipe
    return list(found.values())


def cook(rng: Random, menu: Menu) -> Recipe:
    """Return a random recipe of mostly less than ten tasks."""
    kitchen = _Kitchen(rng, menu)
    if kitchen.once_in(50):
        return labelled({"kind": "chunks", "items": kitchen.some(kitchen.args, 0, 4), "n": 2})
    return labelled(kitchen.growing() if menu.running and kitchen.once_in(20) else kitchen.canvas(depth=3))


class _Kitchen:
    def __init__(self, rng: Random, menu: Menu) -> None:
        self.rng, self.menu = rng, menu
        #: How many more tasks there may be.
        self.left = 6

    def once_in(self, times: int) -> bool:
        return self.rng.randrange(times) == times - 1

    def some(self, make: Callable[[], Any], low: int, high: int) -> list[Any]:
        return [make() for _ in range(self.rng.randint(low, high))]

    def value(self) -> Any:
        return self.rng.choice(_VALUES)

    def args(self) -> list[Any]:
        return self.some(self.value, 0, 2)

    def canvas(self, depth: int) -> Recipe:
        if depth == 0 or self.left <= 1 or self.rng.randrange(10) < 8 - 2 * depth:
            return self.leaf(depth)

        def inner() -> Recipe:
            return self.canvas(depth - 1)

        kind = self.rng.choice(("chain", "chain", "group", "chord"))
        if kind == "chain":
            how = self.rng.choice(("|", "chain", "raw") if self.menu.unfolded else ("|", "chain"))
            parts = self.some(inner, 1 if self.menu.unfolded else 2, 3)
            if all(map(_is_empty, parts)):
                parts.append(self.leaf())  # a chain of nothing cannot be run
            return self.extras({"kind": "chain", "parts": parts, "how": how})
        low = 0 if self.once_in(8) else 1
        members = [self.member(member) for member in self.some(inner, low, 3)]
        if kind == "chord":
            return self.extras({"kind": "chord", "header": members, "body": inner()})
        if len(members) == 1 and not self.menu.lone:
            members.append(self.member(self.leaf()))
        return self.extras({"kind": "group", "members": members})

    def member(self, recipe: Recipe) -> Recipe:
        """Return the recipe as the member of a group."""
        if self.menu.stacked or not (recipe["kind"] == "group" or recipe.get("grouped", False)):
            return recipe
        return {"kind": "chain", "parts": [self.leaf(), recipe], "how": "|"}

    def leaf(self, depth: int = 0) -> Recipe:
        self.left -= 1
        roll = self.rng.randrange(20)
        if roll < 13 or self.left < 0:
            recipe: Recipe = {"kind": "task", "args": self.args()}
        elif roll < 15:
            recipe = self.map()
        elif roll < 17:
            recipe = {"kind": "retry", "args": self.args(), "failures": 1} if self.menu.running else self.map()
        elif roll < 19:
            recipe = self.swap(depth) if self.menu.running else {"kind": "task", "args": self.args()}
        else:
            recipe = {"kind": "fail" if self.menu.failing else "task", "args": self.args()}
        return self.extras(recipe)

    def map(self) -> Recipe:
        """Chunks come as the group that they stand for; alone they do in :func:`cook`, where Celery means that too."""
        kind = self.rng.choice(("map", "starmap", "chunks"))
        if kind == "map":
            return {"kind": kind, "items": self.some(self.value, 0, 3)}
        recipe: Recipe = {"kind": "starmap", "items": self.some(self.args, 0, 3)}
        if kind == "starmap" or (len(recipe["items"]) == 1 and not self.menu.lone):
            return recipe
        return {**recipe, "kind": "chunks", "n": self.rng.randint(1, 2) if self.menu.lone else 1, "grouped": True}

    def swap(self, depth: int) -> Recipe:
        return {"kind": "swap", "args": self.args(), "to": self.canvas(min(depth, 1))}

    def growing(self) -> Recipe:
        """A chord whose header grows while it runs.  Celery on Redis puts what was added anywhere: the body sorts."""

        def member() -> Recipe:
            task = {"kind": "task", "args": self.args()}
            return {"kind": "grow", "args": self.args(), "add": task} if self.once_in(2) else self.leaf()

        return {"kind": "chord", "header": self.some(member, 1, 3), "body": {"kind": "ordered"}}

    def errback(self) -> Recipe:
        return {"kind": self.rng.choice(("log_error", "log_failure"))}

    def extras(self, recipe: Recipe) -> Recipe:
        """Some parts are immutable, delayed, or have callbacks and errbacks."""
        roll = self.rng.randrange(20)
        if roll == 16:
            return {**recipe, "immutable": True}
        if roll == 17:
            return {**recipe, "countdown": self.menu.countdown}
        if roll == 18 and self.menu.links:
            return {**recipe, "links": self.some(lambda: {"kind": "log", "immutable": self.once_in(2)}, 1, 2)}
        if roll == 19 and self.menu.links:
            return {
                **recipe,
                "errbacks": self.some(lambda: {"kind": self.rng.choice(("log_error", "log_failure"))}, 1, 2),
            }
        return recipe


def _is_empty(recipe: Recipe) -> bool:
    return recipe.get("members") == [] or (recipe.get("grouped", False) and not recipe["items"])
