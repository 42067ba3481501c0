"""Recipes: canvases written as JSON, so that one recipe makes the same canvas for any app, here or in a worker.

=========  =====================================================================================================
kind       its other keys
=========  =====================================================================================================
task       ``args``; a task that returns its label and all that it was given, so that a result shows its whole story
fail       ``args``; raises ``ValueError(label)``
retry      ``args``, ``failures``; asks for that many retries first
swap       ``args``, ``to``; replaces itself by the canvas of the recipe ``to``, with its arguments
grow       ``args``, ``add``; adds the canvas of ``add`` to the chord that it is a header task of
chain      ``parts``, ``how``: ``chain(*parts)``, ``|``, or a ``chain`` that is not folded when it is made
group      ``members``
chord      ``header``, ``body``
map        ``items``; also ``starmap``, and ``chunks`` with ``n`` and, for ``chunks(...).group()``, ``grouped``
=========  =====================================================================================================

Any of them may have ``immutable``, ``links``, ``errbacks`` and ``countdown``.  ``label`` is given by :func:`labelled`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from celery import Celery, chain, chord, group
from celery.canvas import Signature, _chain

Recipe = dict[str, Any]
#: The keys that hold recipes, and those that hold lists of them.
_ONE, _MANY = ("to", "add", "body"), ("parts", "members", "header", "links", "errbacks")


def build(recipe: Mapping[str, Any], app: Celery) -> Any:
    """Return the canvas of a recipe, of the tasks that :func:`tests.apps.canvas.define` gave to ``app``."""
    canvas = _BUILDERS[recipe["kind"]](recipe, app)
    if recipe.get("immutable"):
        canvas.set(immutable=True)
    if recipe.get("countdown"):
        canvas.set(countdown=recipe["countdown"])
    for callback in recipe.get("links", ()):
        with contextlib.suppress(IndexError):  # Celery cannot link to an empty group
            canvas.link(build(callback, app))
    for errback in recipe.get("errbacks", ()):
        canvas.link_error(build(errback, app))
    return canvas


def labelled(recipe: Recipe) -> Recipe:
    """Return a copy of the recipe in which each part has its own label."""
    numbers = itertools.count()
    return _copied(recipe, lambda node: {"label": next(numbers), **node})


def keyed(recipe: Recipe, key: str) -> Recipe:
    """Return a copy of the recipe whose callbacks and errbacks take their notes under ``key``."""
    return _copied(recipe, lambda node: {**node, "key": key} if node["kind"].startswith("log") else dict(node))


def _copied(recipe: Recipe, change: Callable[[Mapping[str, Any]], Recipe]) -> Recipe:
    def copy(node: Mapping[str, Any]) -> Recipe:
        found = change(node)
        for key in _ONE:
            if key in found:
                found[key] = copy(found[key])
        for key in _MANY:
            if key in found:
                found[key] = [copy(inner) for inner in found[key]]
        return found

    return copy(recipe)


def parts(recipe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the recipe and all recipes in it."""
    yield recipe
    for key in _ONE:
        if key in recipe:
            yield from parts(recipe[key])
    for key in _MANY:
        for inner in recipe.get(key, ()):
            yield from parts(inner)


def _task(name: str, recipe: Mapping[str, Any], app: Celery, **kwargs: Any) -> Signature:
    return app.tasks[f"canvas.{name}"].s(*recipe.get("args", ()), label=recipe.get("label"), **kwargs)


def _build_chain(recipe: Mapping[str, Any], app: Celery) -> Any:
    found = [build(part, app) for part in recipe["parts"]]
    if recipe.get("how") == "|":
        return functools.reduce(operator.or_, found)
    if recipe.get("how") == "raw":
        return _chain(*found, app=app)
    return chain(*found)


def _build_chunks(recipe: Mapping[str, Any], app: Celery) -> Any:
    found = app.tasks["canvas.call"].chunks(recipe["items"], recipe["n"])
    return found.group() if recipe.get("grouped") else found


_BUILDERS: dict[str, Any] = {
    "task": lambda recipe, app: _task("call", recipe, app),
    "fail": lambda recipe, app: _task("fail", recipe, app),
    "retry": lambda recipe, app: _task("retry", recipe, app, failures=recipe["failures"]),
    "swap": lambda recipe, app: _task("swap", recipe, app, to=recipe["to"]),
    "grow": lambda recipe, app: _task("grow", recipe, app, add=recipe["add"]),
    "ordered": lambda recipe, app: _task("ordered", recipe, app),
    "log": lambda recipe, app: _task("log", recipe, app, key=recipe["key"]),
    "log_error": lambda recipe, app: _task("log_error", recipe, app, key=recipe["key"]),
    "log_failure": lambda recipe, app: _task("log_failure", recipe, app, key=recipe["key"]),
    "chain": _build_chain,
    "group": lambda recipe, app: group([build(member, app) for member in recipe["members"]], app=app),
    "chord": lambda recipe, app: chord(
        [build(member, app) for member in recipe["header"]], build(recipe["body"], app), app=app
    ),
    "map": lambda recipe, app: app.tasks["canvas.one"].map(recipe["items"]),
    "starmap": lambda recipe, app: app.tasks["canvas.call"].starmap(recipe["items"]),
    "chunks": _build_chunks,
}
