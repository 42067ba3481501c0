"""What came of a canvas: a value, an error, or nothing ever; and what its callbacks and errbacks were called with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery.result import AsyncResult, GroupResult, allow_join_result


@dataclass(frozen=True)
class Outcome:
    """Equal when the canvas means the same: values and kinds of errors; not ids, nor the order of callbacks."""

    value: Any = None
    error: str | None = None
    log: tuple[str, ...] = field(default=(), compare=False)

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


def error_name(exc: BaseException) -> str:
    """Return the kind of an error; with its arguments where they are the test's own."""
    name = type(exc).__name__
    return f"{name}{exc.args!r}" if isinstance(exc, ValueError) and len(exc.args) == 1 and isinstance(exc.args[0], int) else name


def settled(result: Any) -> Outcome:
    """Return the outcome of a Celery result all of whose tasks have ended, without waiting for what never comes."""
    if isinstance(result, GroupResult):
        members = [settled(child) for child in result.results]
        bad = next((member for member in members if member.error), None)
        return bad or Outcome(value=[member.value for member in members])
    assert isinstance(result, AsyncResult)
    if result.ready():
        return outcome_of(lambda: result.get(timeout=5))
    # get() raises the error of a task that came before in the chain, too.
    failed = next((node for node in reversed(list(result._parents())) if not isinstance(node, GroupResult) and node.failed()), None)
    return outcome_of(failed.get) if failed is not None else NEVER


def notes(entries: Sequence[str | bytes]) -> tuple[str, ...]:
    """Return log entries in an order of their own."""
    return tuple(sorted(json.dumps(json.loads(entry)) for entry in entries))
