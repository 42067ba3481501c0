"""``byrd.each``: a part of a canvas that calls a task once for each of many items, so many of them at a time.  Pure.

In a plan it is one step, of the task ``byrd.each``.  That step gives its slot back while its items are under way; they
are steps of kind *item*, and come into the run a page at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from celery.canvas import Signature

from byrd.errors import CanvasError

EACH = "byrd.each"
#: What the task is told, beside the arguments of its enumerator.
_TASK, _ITEMS, _PAGES, _LIMIT, _TOLERATE, _RESULTS = _SAID = (
    "task", "items", "pages", "limit", "tolerate", "results",
)  # fmt: skip
#: So many items at once, unless somebody says otherwise, and never more than this.
DEFAULT_LIMIT = 8
MOST_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True)
class Each:
    """What an each does: call ``task`` for the ``items``, for those that ``pages`` enumerates, or for its input's."""

    task: Any
    items: list[Any] | None
    pages: Any
    limit: int
    tolerate: int | float
    results: bool


def each(
    task: Any,
    *,
    over: Any = None,
    limit: int = DEFAULT_LIMIT,
    tolerate: float = 0,
    results: bool = True,
) -> Signature:
    """Return a canvas part that calls a task for each item, at most ``limit`` at once, and has the list of its values.

    ``chain(list_pages.s(), byrd.each(scrape.s(), limit=8), report.s())``: ``scrape`` is called with each item of the
    list that ``list_pages`` returns, before its own arguments, and ``report`` gets the list of what it returned, in the
    order of the items.
    ``over``: the items, instead of what comes before; or the signature of an enumerator, a task of the same app that is
    called with ``cursor=`` (None at first) and returns ``(items, next_cursor)``; a next cursor of None is the end, as
    is None in place of both.  It may be called again for the same page, and what comes before is its first argument.
    ``limit``: 1 to 10,000 items are ready or running at once, over all workers.
    ``tolerate``: how many items may fail (an int), or which share of them (0 <= share < 1); a failed one's value is
    None.  Once more have failed, no other starts, and the step fails with :class:`EachToleranceError`.
    ``results``: with False its value is ``{"items": 1000, "failed": 3}``, and no list is made.

    Raises :class:`CanvasError` for what cannot be.
    """
    told: dict[str, Any] = {_TASK: _signature(task, "the task")}
    if isinstance(over, Signature):
        told[_PAGES] = over
    elif over is not None:
        if isinstance(over, str | bytes | Mapping) or not isinstance(over, Iterable):
            raise CanvasError(
                f"byrd.each: over={over!r:.80} is neither a list of items nor the signature of an enumerator"
            )
        told[_ITEMS] = list(over)
    told |= {_LIMIT: _limit(limit), _TOLERATE: _tolerance(tolerate), _RESULTS: _truth(results)}
    return Signature(EACH, kwargs=told)


def is_each(sig: Signature) -> bool:
    """Tell whether a signature is an each: its clones are known by the task's name only."""
    return bool(sig.task == EACH)


def each_of(said: Mapping[str, Any]) -> Each:
    """Return what the keyword arguments of an each say; they may have been through JSON, or written by hand."""
    if unknown := sorted(said.keys() - set(_SAID)):
        raise CanvasError(f"{EACH} takes no argument {unknown[0]!r}")
    if _TASK not in said:
        raise CanvasError(f"an {EACH} without a task cannot be submitted; make it with byrd.each(...)")
    items, pages = said.get(_ITEMS), said.get(_PAGES)
    if items is not None and (pages is not None or not isinstance(items, list | tuple)):
        raise CanvasError(f"{EACH} goes over a list of items, or over an enumerator's: one of the two")
    return Each(
        task=_signature(said[_TASK], "the task"),
        items=None if items is None else list(items),
        pages=None if pages is None else _signature(pages, "the enumerator"),
        limit=_limit(said.get(_LIMIT, DEFAULT_LIMIT)),
        tolerate=_tolerance(said.get(_TOLERATE, 0)),
        results=_truth(said.get(_RESULTS, True)),
    )


def _signature(found: Any, what: str) -> Any:
    if isinstance(found, Mapping) and "task" in found:  # so is a Signature
        return found
    if hasattr(found, "s") and hasattr(found, "name"):
        raise CanvasError(f"byrd.each: {found.name} is a task, not a signature: give it {found.name}.s(...)")
    raise CanvasError(f"byrd.each: {what} is the signature of a task, not {found!r:.80}")


def _limit(limit: Any) -> int:
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MOST_AT_ONCE:
        raise CanvasError(f"byrd.each: limit={limit!r} is no number of items at once (1 to {MOST_AT_ONCE:,})")
    return limit


def _tolerance(tolerate: Any) -> int | float:
    if isinstance(tolerate, int) and not isinstance(tolerate, bool) and tolerate >= 0:
        return tolerate
    if isinstance(tolerate, float) and math.isfinite(tolerate) and 0 <= tolerate < 1:
        return tolerate
    raise CanvasError(
        f"byrd.each: tolerate={tolerate!r} is neither a number of items (an int) nor a share of them (0 <= share < 1)"
    )


def _truth(results: Any) -> bool:
    if not isinstance(results, bool):
        raise CanvasError(f"byrd.each: results={results!r} is neither True nor False")
    return results
