"""When a schedule is due: the instants of crontabs, intervals, solar events and single dates.

Every answer depends on the schedule and on the instant asked about alone, never on when a process started or last
looked, so any number of beats agree on each due time to the microsecond.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Any, Protocol

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ONE_DAY = timedelta(days=1)

# 29 February on a given weekday comes back after 40 years at most (28, or 40 across 2100).
_HORIZON_DAYS = 41 * 366


class Timetable(Protocol):
    """The instants at which something is due."""

    def after(self, instant: datetime) -> datetime | None:
        """The first due time later than `instant`."""
        ...

    def latest(self, instant: datetime) -> datetime | None:
        """The last due time not later than `instant`."""
        ...


@dataclass(frozen=True)
class CrontabTimes:
    """The instants of a crontab in its own time zone.

    A crontab that names hours is due once for each wall time: a wall time that the clocks skip is due as long after
    midnight as usual (02:30 is due when the clocks already show 03:30), and one that they repeat is due at its first
    occurrence.  A crontab for every hour follows real time instead, so that "every ten minutes" neither pauses nor
    bunches up when the clocks change.
    """

    minutes: frozenset[int]
    hours: frozenset[int]
    days_of_month: frozenset[int]
    months: frozenset[int]
    days_of_week: frozenset[int]  # Sunday is 0
    zone: tzinfo

    def after(self, instant: datetime) -> datetime | None:
        found: datetime | None = None
        for day in self._days(instant.astimezone(self.zone).date() - ONE_DAY, step=1):
            if found is not None and day > found.astimezone(self.zone).date():
                break
            instants = _instants_of_day(self, day) if self._on(day) else ()
            position = bisect_right(instants, instant)
            if position < len(instants) and (found is None or instants[position] < found):
                found = instants[position]
        return found

    def latest(self, instant: datetime) -> datetime | None:
        found: datetime | None = None
        for day in self._days(instant.astimezone(self.zone).date(), step=-1):
            if found is not None and day < found.astimezone(self.zone).date() - ONE_DAY:
                break
            instants = _instants_of_day(self, day) if self._on(day) else ()
            position = bisect_right(instants, instant)
            if position and (found is None or instants[position - 1] > found):
                found = instants[position - 1]
        return found

    def _on(self, day: date) -> bool:
        return (
            day.month in self.months
            and day.day in self.days_of_month
            and day.isoweekday() % 7 in self.days_of_week  # both have to match: Celery's reading, not cron's
        )

    def _days(self, first: date, *, step: int) -> Iterator[date]:
        # Where clocks jump over midnight, the last wall times of a day are due on the next: hence the day before and
        # after the one that was asked about or found.
        return (first + timedelta(days=step * offset) for offset in range(_HORIZON_DAYS))


@lru_cache(maxsize=512)
def _instants_of_day(crontab: CrontabTimes, day: date) -> tuple[datetime, ...]:
    walls = [
        datetime(day.year, day.month, day.day, hour, minute, tzinfo=crontab.zone)
        for hour in crontab.hours
        for minute in crontab.minutes
    ]
    if len(crontab.hours) < 24:
        return tuple(sorted({wall.astimezone(UTC) for wall in walls}))
    occurrences = ((wall, wall.replace(fold=fold).astimezone(UTC)) for wall in walls for fold in (0, 1))
    shown = {instant for wall, instant in occurrences if _wall(instant.astimezone(crontab.zone)) == _wall(wall)}
    return tuple(sorted(shown))


def _wall(moment: datetime) -> datetime:
    return moment.replace(tzinfo=None, fold=0)


@dataclass(frozen=True)
class IntervalTimes:
    """The instants of a grid with one point at `anchor`."""

    every: timedelta
    anchor: datetime = EPOCH

    def after(self, instant: datetime) -> datetime | None:
        return self.anchor + ((instant - self.anchor) // self.every + 1) * self.every

    def latest(self, instant: datetime) -> datetime | None:
        return self.anchor + (instant - self.anchor) // self.every * self.every


@dataclass(frozen=True)
class ClockedTime:
    """One instant."""

    at: datetime

    def after(self, instant: datetime) -> datetime | None:
        return self.at if self.at > instant else None

    def latest(self, instant: datetime) -> datetime | None:
        return self.at if self.at <= instant else None


@dataclass(frozen=True)
class SolarTimes:
    """The instants of a solar event, in whole seconds; `schedule` is Celery's ``solar``."""

    schedule: Any

    def after(self, instant: datetime) -> datetime | None:
        return next((event for event in self._events(instant, step=1) if event > instant), None)

    def latest(self, instant: datetime) -> datetime | None:
        return next((event for event in self._events(instant, step=-1) if event <= instant), None)

    def _events(self, instant: datetime, *, step: int) -> Iterator[datetime]:
        """The events day by day from `instant`'s, up to the year in which even a polar night ends."""
        today = instant.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        for offset in range(367):
            yield from sorted(self._events_of_day(today + timedelta(days=step * offset)), reverse=step < 0)

    def _events_of_day(self, midnight: datetime) -> list[datetime]:
        # The search is numerical: its answer varies in the last digits with where it starts.  Starting at midnight UTC
        # always, and dropping the fraction of the second, every beat gets the same one.
        events: list[datetime] = []
        start = midnight
        while (event := self._first_event(start)) is not None and event < midnight + ONE_DAY:
            events.append(event)
            start = event + timedelta(hours=1)
        return events

    def _first_event(self, start: datetime) -> datetime | None:
        ephem = self.schedule.ephem
        center = {"use_center": True} if self.schedule.use_center else {}
        self.schedule.cal.date = ephem.Date(start)
        try:
            event = getattr(self.schedule.cal, self.schedule.method)(ephem.Sun(), start=ephem.Date(start), **center)
        except ephem.CircumpolarError:  # the sun stays up, or down, on this day
            return None
        found: datetime = event.datetime()
        return found.replace(microsecond=0, tzinfo=UTC)


@dataclass(frozen=True)
class DueTimes:
    """Which due time of one schedule has to be fired.

    Due times up to `fired` are done with.  Of several that were missed, while no beat ran, only the latest is fired;
    a one-off fires its first instead, which stays the same however late it is looked at.
    """

    timetable: Timetable
    fired: datetime
    start: datetime | None = None
    one_off: bool = False
    grace: timedelta | None = None  # a due time missed by more than this is dropped

    def due(self, now: datetime) -> datetime | None:
        """The due time to fire now, if there is one."""
        done = self.fired if self.grace is None else max(self.fired, now - self.grace)
        found = self._first_after(done) if self.one_off else self.timetable.latest(now)
        if found is None or not done < found <= now or (self.start is not None and found < self.start):
            return None
        return found

    def following(self, now: datetime) -> datetime | None:
        """The first due time later than `now`."""
        return self._first_after(max(now, self.fired))

    def _first_after(self, instant: datetime) -> datetime | None:
        if self.start is not None and instant < self.start:
            instant = self.start - timedelta(microseconds=1)
        return self.timetable.after(instant)


def timetable_of(task: Any) -> Timetable:
    """The timetable of a django-celery-beat ``PeriodicTask``."""
    if task.crontab:
        crontab = task.crontab.schedule
        return CrontabTimes(
            minutes=frozenset(crontab.minute),
            hours=frozenset(crontab.hour),
            days_of_month=frozenset(crontab.day_of_month),
            months=frozenset(crontab.month_of_year),
            days_of_week=frozenset(crontab.day_of_week),
            zone=crontab.tz,
        )
    if task.interval:
        every = timedelta(**{task.interval.period: task.interval.every})
        return IntervalTimes(every, task.start_time or EPOCH)
    if task.solar:
        return SolarTimes(task.solar.schedule)
    return ClockedTime(task.clocked.clocked_time)


def due_times_of(task: Any) -> DueTimes:
    """The due times of a django-celery-beat ``PeriodicTask``, from what its row says."""
    if task.last_run_at is not None:
        fired = task.last_run_at
    elif task.clocked:
        fired = EPOCH  # a date that has passed already is due at once, as in django-celery-beat
    else:
        fired = task.date_changed  # never run, or resumed just then: what was due before is not made up for
    return DueTimes(
        timetable_of(task),
        fired=fired,
        start=task.start_time,
        one_off=task.one_off,
        grace=None if task.expire_seconds is None else timedelta(seconds=task.expire_seconds),
    )
