"""The scheduler of ``celery beat -S beat.scheduler:ByrdScheduler``: each due time of a schedule submits one run.

For periodic tasks of ``byrd.submit`` no message is sent: the run is written straight into Postgres under a key made of
the schedule and its due time, so beats that run side by side, or again after a crash, submit it once between them.  All
other periodic tasks are django-celery-beat's own affair.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import django
from celery import schedules
from celery.utils.log import get_logger
from django.apps import apps

if not apps.ready:  # no Django of the user's own is running: this project's then; models can be imported only after it
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "beat.settings")
    django.setup()

from django.db import (
    DatabaseError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
    close_old_connections,
    router,
    transaction,
)
from django.db.models import F
from django_celery_beat.models import PeriodicTasks
from django_celery_beat.schedulers import DatabaseScheduler, ModelEntry
from django_celery_beat.utils import NEVER_CHECK_TIMEOUT

from beat import SUBMIT_TASK
from beat.calls import check_signature, read_call
from beat.clock import DatabaseClock, ask
from beat.timetable import DueTimes, due_times_of
from byrd.errors import ByrdError, ConfigurationError, NotLiveError

logger = get_logger(__name__)

_RETRY_SECONDS = 5.0
_LONGEST_RETRY_SECONDS = 30.0
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
#: A schedule that was fired so much later than now was fired by a wrong clock, or written to by one.
_AHEAD = timedelta(seconds=1)


class ByrdEntry(ModelEntry):
    """A periodic task in memory.  Of a schedule it says when to look; what to do then is up to the row."""

    clock: ClassVar[DatabaseClock] = DatabaseClock()
    due_times: DueTimes | None = None  # None: an ordinary periodic task
    not_before = 0.0  # on the monotonic clock
    failures = 0

    def __init__(self, model: Any, app: Any = None) -> None:
        try:
            self.due_times = _due_times(model)
            super().__init__(model, app=app)
        except (DatabaseError, InterfaceError):
            raise
        except Exception as error:
            # One schedule that cannot be read must not stop the others: ValueError is what the caller skips.
            logger.error("Schedule %s is left out, because it cannot be read: %r", model.name, error)  # noqa: TRY400
            raise ValueError(f"schedule {model.name} cannot be read") from error

    def is_due(self) -> Any:
        if self.due_times is None:
            return super().is_due()
        if (wait := self.not_before - time.monotonic()) > 0:
            return schedules.schedstate(is_due=False, next=wait)
        if not self.model.enabled:
            return schedules.schedstate(is_due=False, next=_RETRY_SECONDS)
        now = self.clock.now()
        if self.due_times.due(now) is not None or _expired(self.model, now) or _fired_later(self.due_times, now):
            return schedules.schedstate(is_due=True, next=0)  # then it is asked again, and answers from the new row
        following = self.due_times.following(now)
        wait = NEVER_CHECK_TIMEOUT if following is None else (following - now).total_seconds()
        return schedules.schedstate(is_due=False, next=wait)

    def see(self, row: Any) -> None:
        """Take over what the row says now."""
        self.model = row
        self.due_times = _due_times(row)
        self.not_before, self.failures = 0.0, 0

    def postpone(self) -> None:
        """Look again soon, and later with each failure in a row."""
        self.failures += 1
        self.not_before = time.monotonic() + min(2.0 ** (self.failures - 1), _LONGEST_RETRY_SECONDS)


class ByrdScheduler(DatabaseScheduler):
    """django-celery-beat's scheduler, in which schedules submit runs."""

    Entry = ByrdEntry

    def setup_schedule(self) -> None:
        while True:
            try:
                # django-celery-beat remembers its first look at the changes instead, which comes after it has read the
                # schedules: what changed in between it would not see for five minutes.
                self._last_timestamp = self.Changes.last_change() or _LONG_AGO
                super().setup_schedule()
                return
            except ProgrammingError as error:
                logger.warning("The tables of schedules are missing: run `python -m beat migrate`. (%s)", _line(error))
            except (OperationalError, InterfaceError) as error:
                logger.warning("Postgres does not answer, trying again in %.0f s: %s", _RETRY_SECONDS, _line(error))
            self._initial_read = True
            close_old_connections()
            time.sleep(_RETRY_SECONDS)

    def enabled_models_qs(self) -> Any:
        # django-celery-beat reads only the crontabs whose hour is near the server's, which loses the due times to make
        # up for after an outage of hours. All of them fit in memory.
        return self.Model.objects.enabled()

    def tick(self, *args: Any, **kwargs: Any) -> float:
        try:
            if ByrdEntry.clock.set(router.db_for_write(self.Model)):
                logger.warning("Postgres's clock was stepped: all schedules are looked at again")
                self._heap = None
            wait: float = super().tick(*args, **kwargs)
        except (OperationalError, InterfaceError) as error:
            logger.warning("Postgres does not answer, trying again in %.0f s: %s", _RETRY_SECONDS, _line(error))
            self._last_timestamp = _LONG_AGO  # or a change that was just being read would not be seen again
            close_old_connections()
            return _RETRY_SECONDS
        return wait

    def _when(self, entry: Any, next_time_to_run: float, *_: Any) -> float:
        # Celery's heap goes by the time of day: once that is set back, nothing would be looked at until it caught up.
        return time.monotonic() + (self.adjust(next_time_to_run) or 0)

    def schedule_changed(self) -> bool:
        known = self._last_timestamp
        changed: bool = super().schedule_changed()
        return changed or self._last_timestamp != known  # of two changes at once, the earlier one may be written last

    def reserve(self, entry: Any) -> Any:
        return super().reserve(entry) if entry.due_times is None else entry

    def apply_entry(self, entry: Any, producer: Any = None) -> None:
        if entry.due_times is None:
            super().apply_entry(entry, producer=producer)
            return
        try:
            self._fire(entry)
        except (NotLiveError, DatabaseError, InterfaceError) as error:
            logger.warning("Schedule %s could not submit its run, trying again: %s", entry.name, _line(error))
        except ByrdError as error:
            logger.error("Schedule %s cannot submit its run: %s", entry.name, error)  # noqa: TRY400
        except Exception:
            logger.exception("Schedule %s failed to submit its run, trying again", entry.name)
        else:
            return
        entry.postpone()

    def _fire(self, entry: ByrdEntry) -> None:
        """Submit the run that is due by the schedule's row, and record it there.

        The row stays locked meanwhile, so that a schedule which somebody has paused does not fire any more, and a
        one-off fires for one beat.  Killed after the submission and before the record, the due time is submitted again
        under its key, which changes nothing.
        """
        database = router.db_for_write(self.Model)
        with _undisturbed(), transaction.atomic(using=database):
            now = ask(database)
            rows = self.Model.objects.using(database).filter(pk=entry.model.pk)
            locked = rows.select_related("interval", "crontab", "solar", "clocked")
            row = locked.select_for_update(skip_locked=True, of=("self",)).first()
            if row is None:  # another beat is firing it, or it was deleted just now
                entry.postpone()
                return
            if changes := self._changes(row, now):
                rows.update(**changes)
                row.refresh_from_db(fields=list(changes))
                if not row.enabled:
                    PeriodicTasks.update_changed()
        entry.see(row)

    def _changes(self, row: Any, now: datetime) -> dict[str, Any]:
        paused = {"enabled": False, "last_run_at": None, "date_changed": now}
        if row.task != SUBMIT_TASK or not row.enabled:
            return {}
        if _expired(row, now):
            logger.info("Schedule %s has expired", row.name)
            return paused
        due_times = due_times_of(row)
        if _fired_later(due_times, now):
            logger.warning(
                "Schedule %s was fired at %s, which is yet to come: a clock was wrong. It goes on from now.",
                row.name,
                due_times.fired.isoformat(),
            )
            return {"last_run_at": now}
        due = due_times.due(now)
        if due is None:
            return {}
        run = self._submit(row, due)
        logger.info("Schedule %s, due at %s: run %s", row.name, due.isoformat(), run.id)
        fired = {"last_run_at": now, "total_run_count": F("total_run_count") + 1}
        return {**fired, **paused} if row.one_off else fired

    def _submit(self, row: Any, due: datetime) -> Any:
        engine = getattr(self.app, "byrd", None)
        if engine is None:
            raise ConfigurationError(f"The app {self.app.main!r} has no Byrd. Add `engine = byrd.Byrd(app)` to it.")
        call = read_call(row)
        check_signature(call, engine.workflow_named(call.workflow))
        return engine.submit(call.workflow, *call.args, key=due_key(row, due), **call.kwargs)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back the signals by which beat is told to stop.

    Celery's handler would raise SystemExit in the middle: a run would be submitted, and its due time not be recorded
    before another beat comes to it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers are called in the main thread only
        return
    told: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, _frame: told.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if told:
            signal.raise_signal(told[0])


def due_key(row: Any, due: datetime) -> str:
    """The key of the run of one due time: the same for every beat."""
    return f"schedule:{row.pk}:{due.astimezone(UTC).isoformat()}"


def _due_times(row: Any) -> DueTimes | None:
    return due_times_of(row) if row.task == SUBMIT_TASK else None


def _fired_later(due_times: DueTimes, now: datetime) -> bool:
    """Whether no due time of the near future would be fired, for they are done with by a clock that was wrong."""
    return due_times.fired > now + _AHEAD


def _expired(row: Any, now: datetime) -> bool:
    return row.expires is not None and now >= row.expires


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
