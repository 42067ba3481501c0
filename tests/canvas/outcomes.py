"""What came of a canvas: a value, an error, or nothing ever; and what its callbacks and errbacks were called with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery.canvas import chunks
from celery.result import AsyncResult, GroupResult, allow_join_result

from byrd.errors import CanvasError


@dataclass(frozen=True)
class Outcome:
    """Equal when the canvas means the same: the same value, or the same error but for ids."""

    value: Any = None
    error: str | None = None

    @property
    def kind(self) -> str:
        """The error's type, or ``value``."""
        return self.error.partition("(")[0] if self.error else "value"

    @property
    def canonical(self) -> Any:
        """The value with every list sorted: workers of Celery reverse a group that is a direct member of another."""
        return _sorted(self.value)

    def __str__(self) -> str:
        return self.error or json.dumps(self.value)


#: Celery never gives this canvas a result: a ``get()`` without a time-out waits for ever.
NEVER = Outcome(error="never")


def outcome_of(get: Callable[[], Any]) -> Outcome:
    """Return what ``get`` returns or raises."""
    try:
        with allow_join_result():
            return Outcome(value=json.loads(json.dumps(get())))
    except Exception as exc:  # noqa: BLE001 - whatever the canvas raises is what we want to know
        return Outcome(error=error_name(exc))


def eager(make: Callable[[], Any]) -> Outcome:
    """Return what comes of a canvas of an eager app."""

    def get() -> Any:
        canvas = make()
        # apply_async() of a single task denies it to wait, which replace() does when it is eager.
        single = canvas.subtask_type is None and not isinstance(canvas, chunks)
        result = canvas.apply() if single else canvas.apply_async()
        if result is None:
            raise CanvasError("an empty chain: Celery returns None instead of a result")
        if isinstance(result, GroupResult) and len(result) == 1 and isinstance(result[0], GroupResult):
            result = result[0]  # as group.apply_async() does where it is not eager
        return result.get(disable_sync_subtasks=False)

    return outcome_of(get)


def error_name(exc: BaseException) -> str:
    """Return the kind of an error; with its arguments where they are the test's own."""
    own = isinstance(exc, ValueError) and len(exc.args) == 1 and isinstance(exc.args[0], int)
    return type(exc).__name__ + (repr(exc.args) if own else "")


def settled(result: Any) -> Outcome:
    """Return the outcome of a Celery result all of whose tasks have ended, without waiting for what never comes."""
    if isinstance(result, Exception):
        return Outcome(error=error_name(result))
    if isinstance(result, GroupResult):
        members = [settled(child) for child in result.results]
        bad = next((member for member in members if member.error), None)
        return bad or Outcome(value=[member.value for member in members])
    assert isinstance(result, AsyncResult)
    if result.ready():
        return outcome_of(lambda: result.get(timeout=5))
    # get() raises the error of a task that came before in the chain, too.
    before = [node for node in result._parents() if isinstance(node, AsyncResult) and node.failed()]
    return outcome_of(before[-1].get) if before else NEVER


def _sorted(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(map(_sorted, value), key=json.dumps)
    return value
