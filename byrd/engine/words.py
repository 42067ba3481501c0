"""Times, durations, counts and errors in words that people read."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def moment(when: datetime | None, now: datetime | None = None) -> str:
    """Return a local time: with its date unless that is today's, ``14:03:10`` or ``2026-11-22 14:03:10``."""
    if when is None or when.year >= 9999:
        return "never"
    local = when.astimezone()
    today = (now or datetime.now(UTC)).astimezone().date()
    return local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M:%S")


def span(seconds: float) -> str:
    """Return a duration as people say it: ``40 ms``, ``1.2 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 days``."""
    seconds = max(0.0, seconds)
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return _two(whole // _MINUTE, "min", whole % _MINUTE, "s")
    if whole < 2 * _DAY:
        return _two(whole // _HOUR, "h", whole % _HOUR // _MINUTE, "min")
    return f"{whole // _DAY} days"


def ago(when: datetime, now: datetime) -> str:
    """Return ``12 s ago``, or ``in 12 s`` for what is to come."""
    seconds = (now - when).total_seconds()
    return f"{span(seconds)} ago" if seconds >= 0 else f"in {span(-seconds)}"


def since(when: datetime, now: datetime) -> str:
    """Return ``14:03:10 (12 s ago)``."""
    return f"{moment(when, now)} ({ago(when, now)})"


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 step``, ``1,000 steps``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def error_text(error: str | None, *, longest: int = 200) -> str:
    """Return a recorded error (JSON) as one line: ``ValueError: no money``."""
    if not error:
        return "an error that is not on record"
    try:
        found = json.loads(error)
    except ValueError:
        return shortened(error, longest)
    if not isinstance(found, dict):
        return shortened(str(found), longest)
    said = found.get("exc_message")
    parts = said if isinstance(said, list | tuple) else [said]
    message = ", ".join(str(part) for part in parts if part not in (None, ""))
    kind = str(found.get("exc_type") or "Error")
    return shortened(f"{kind}: {message}" if message else kind, longest)


def error_fields(error: str | None) -> dict[str, Any] | None:
    """Return a recorded error (JSON) as type and message, for machines."""
    if not error:
        return None
    kind, _, message = error_text(error, longest=2000).partition(": ")
    return {"type": kind, "message": message}


def shortened(text: str, longest: int) -> str:
    """Return ``text`` on one line, no longer than ``longest``."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _two(major: int, major_unit: str, minor: int, minor_unit: str) -> str:
    return f"{major} {major_unit}" + (f" {minor} {minor_unit}" if minor else "")
