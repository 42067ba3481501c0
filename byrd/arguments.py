"""What a part of a canvas is called with, and when: checked, and in the words of a plan.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from kombu.utils.json import dumps

from byrd.errors import ArgumentError
from byrd.waits import Wait


def times_of(options: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return when the step may start and until when, in the plan's words."""
    times: dict[str, Any] = {}
    countdown, eta, expires = options.get("countdown"), options.get("eta"), options.get("expires")
    if countdown is not None:
        times["countdown"] = _seconds(countdown, "countdown", task)
    elif eta is not None:
        times["eta"] = _moment(eta, "eta", task)
    if expires is not None:
        if isinstance(expires, int | float) and not isinstance(expires, bool):
            times["expires_in"] = _seconds(expires, "expires", task)
        else:
            times["expires_at"] = _moment(expires, "expires", task)
    return times


def time_of_wait(wait: Wait, times: dict[str, Any]) -> dict[str, Any]:
    """Return when a wait is over, in the plan's words; a delay that its options ask for comes before it."""
    start, delay = times.pop("eta", None), times.pop("countdown", 0.0)
    if wait.until is not None:
        times["eta"] = wait.until if start is None else max(wait.until, start)
    elif wait.seconds is not None and start is not None:
        times["eta"] = start + timedelta(seconds=wait.seconds)
    elif wait.seconds is not None:
        times["countdown"] = max(0.0, delay) + wait.seconds
    return times


def _seconds(value: Any, name: str, task: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ArgumentError(f"{task}: {name}={value!r} is not a number of seconds") from None
    if not -1e9 < seconds < 1e9:
        raise ArgumentError(f"{task}: {name}={value!r} is out of range")
    return seconds


def _moment(value: Any, name: str, task: str) -> datetime:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ArgumentError(f"{task}: {name}={value!r} is not an ISO 8601 date and time") from None
    if not isinstance(value, datetime):
        raise ArgumentError(f"{task}: {name}={value!r} is neither a datetime nor a number of seconds")
    # A naive moment is UTC, as Celery's workers take it.
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value


def checked_priority(value: Any, task: str) -> int:
    """Return a priority: a whole number from 0, which is served first, to 9; raise :class:`ArgumentError` otherwise.

    As text it comes from a setting of Celery's that was read from the environment.
    """
    found = _PRIORITIES.get(str(value))
    if found is None:
        raise ArgumentError(f"{task}: priority={value!r:.80} is not a whole number from 0, which is served first, to 9")
    return found


_PRIORITIES = {str(number): number for number in range(10)}


def json_of(value: Any, task: str, what: str) -> str:
    """Return ``value`` as JSON text in Celery's own dialect (kombu's), or raise :class:`ArgumentError`."""
    try:
        text: str = dumps(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise ArgumentError(f"{task}: its {what} cannot be held by JSON: {exc}") from None
    if "\\u0000" in text and _has_nul(value):
        raise ArgumentError(f"{task}: its {what} contain a NUL character, which Postgres cannot hold; remove it")
    return text


def _has_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, Mapping):
        return any(_has_nul(k) or _has_nul(v) for k, v in value.items())
    return isinstance(value, list | tuple | set) and any(_has_nul(item) for item in value)
