"""The time of day that schedules go by: Postgres's, the same for every beat, whatever the clock of its machine says."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from django.db import connections

#: Slow answers explain as much.
_STEP = timedelta(seconds=1)


def ask(database: str) -> datetime:
    """What Postgres says now."""
    with connections[database].cursor() as cursor:
        cursor.execute("SELECT clock_timestamp()")
        said: datetime = cursor.fetchone()[0]
    return said.astimezone(UTC)


class DatabaseClock:
    """Postgres's clock, set at each tick and carried on by the monotonic clock in between."""

    def __init__(self) -> None:
        self._set_to: datetime | None = None
        self._set_at = 0.0

    def now(self) -> datetime:
        """What Postgres would say now, or a little less; never more, unless its clock was set back meanwhile."""
        if self._set_to is None:
            raise AssertionError("the clock is set at each tick")
        return self._set_to + timedelta(seconds=time.monotonic() - self._set_at)

    def set(self, database: str) -> bool:
        """Ask Postgres; tell whether its clock was stepped since the last time."""
        asked_at = time.monotonic()
        before = None if self._set_to is None else self.now()
        said = ask(database)
        self._set_to, self._set_at = said, time.monotonic()
        slow = timedelta(seconds=self._set_at - asked_at)
        return before is not None and not before - _STEP <= said <= before + slow + _STEP
