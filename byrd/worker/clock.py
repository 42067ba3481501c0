"""Tells, from outside, when Postgres's clock is stepped, and when Postgres was restarted.

Leases and due times go by that clock alone.  It is compared with this process's monotonic one, which nobody can set.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

#: A step is told from a slow answer with certainty, but one that is shorter harms nobody: heartbeats come more often.
_STEP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """What happened since the last look.  ``stepped``: by at least how many seconds, negative for a step back.

    ``behind``: it went back at some time, for there is a heartbeat that is yet to come.
    """

    restarted: bool = False
    stepped: float = 0.0
    behind: bool = False


@dataclass(frozen=True, slots=True)
class _Reading:
    now: float
    started: float
    asked: float
    answered: float


class ServerClock:
    """Postgres's clock, as the answers to one question after the other show it."""

    def __init__(self) -> None:
        self._last: _Reading | None = None

    def look(self, ask: Callable[[], tuple[float, float, bool]]) -> Change:
        """Ask for Postgres's time and that of its start, and compare both with what they were."""
        asked = time.monotonic()
        now, started, behind = ask()
        reading = _Reading(now, started, asked, time.monotonic())
        last, self._last = self._last, reading
        if last is None:
            return Change(behind=behind)
        stepped = _stepped(last, reading)
        return Change(reading.started != last.started, stepped, behind or stepped < 0)


def _stepped(last: _Reading, reading: _Reading) -> float:
    """Return by how much at least the clock was stepped: each answer was given between its question and its arrival."""
    passed = reading.now - last.now
    longest, shortest = reading.answered - last.asked, reading.asked - last.answered
    if passed > longest + _STEP_SECONDS:
        return passed - longest
    if passed < shortest - _STEP_SECONDS:
        return passed - shortest
    return 0.0
