"""Says in plain sentences why a schedule submits no run, or when it will: what ``byrd why SCHEDULE`` prints."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from celery.schedules import crontab

from byrd.engine.words import ago, count, moment, since
from byrd.errors import UnknownWorkflowError
from byrd.store import insight
from byrd.store.insight import Schedule

if TYPE_CHECKING:
    from byrd.engine.engine import Byrd

#: A scheduler that runs has fired what was due this long ago.
_LATE = timedelta(seconds=15)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def explain_schedule(engine: Byrd, name: str, *, task: str = "byrd.submit") -> list[str] | None:
    """Return what is to say of the schedule of that name; None when there is none."""
    found = engine.runtime.store.run(insight.schedule, name, task=task)
    if found is None:
        return None
    refused = _refused(engine, found)
    return [_standing(found), *([refused] if refused else []), *([last] if (last := _last(found)) else [])]


def _standing(schedule: Schedule) -> str:
    now, timing = schedule.now, _timing(schedule)
    changed = since(schedule.date_changed, now)
    if schedule.expires is not None and schedule.expires <= now:
        return f"It expired at {moment(schedule.expires, now)}, so it submits nothing any more."
    if not schedule.enabled and schedule.one_off and schedule.fired:
        return f"It was to fire once ({timing}), and has, so it is paused since {changed}."
    if not schedule.enabled:
        return (
            f"It is paused since {changed}: it submits nothing ({timing}) until it is resumed in the admin"
            f"{_switched(schedule)}."
        )
    due = _due(schedule)
    if due is None:
        return f"It is active ({timing})."
    if due > now - _LATE:
        return f"It is active ({timing}), and due at {moment(due, now)} ({ago(due, now)})."
    return (
        f"It was due at {since(due, now)}, and has not fired ({timing}): no beat runs on this database (`celery -A "
        "<app> beat --scheduler=beat.scheduler:ByrdScheduler`), or its run is refused, which beat's log says."
    )


def _switched(schedule: Schedule) -> str:
    """Say who paused it, as far as the admin's history has it: code that does so leaves no trace there."""
    if schedule.switched is None:
        return ""
    by, at, added = schedule.switched
    return f", whose history says that {by} {'added it' if added else 'switched it last'} at {since(at, schedule.now)}"


def _timing(schedule: Schedule) -> str:
    if schedule.crontab is not None:
        return f"{' '.join(schedule.crontab)} {schedule.timezone}"
    if schedule.every is not None:
        period = schedule.period or "seconds"
        return f"every {period.removesuffix('s')}" if schedule.every == 1 else f"every {schedule.every:,} {period}"
    if schedule.clocked is not None:
        return f"once, at {moment(schedule.clocked, schedule.now)}"
    return f"at each {(schedule.solar or 'event').replace('_', ' ')}"


def _due(schedule: Schedule) -> datetime | None:
    """Return the first time at which it is due after it last fired; None where only the scheduler can tell."""
    after = max(schedule.last_run_at or schedule.date_changed, schedule.start_time or _EPOCH)
    if schedule.clocked is not None:
        return schedule.clocked
    if schedule.every is not None:
        every, anchor = timedelta(**{schedule.period or "seconds": schedule.every}), schedule.start_time or _EPOCH
        return anchor + ((after - anchor) // every + 1) * every
    if schedule.crontab is None:
        return None
    minute, hour, day, month, weekday = schedule.crontab
    times = crontab(minute, hour, weekday, day, month, nowfun=lambda: after)
    times.tz = ZoneInfo(schedule.timezone or "UTC")
    due: datetime = after + times.remaining_estimate(after)
    return due


def _refused(engine: Byrd, schedule: Schedule) -> str | None:
    """Say what this app, if it has any workflows, would refuse in the call that the schedule holds."""
    try:
        workflow, *args = json.loads(schedule.args)
        kwargs = json.loads(schedule.kwargs)
        build: Callable[..., object] = engine.workflow_named(workflow).build
        inspect.signature(build).bind(*args, **kwargs)
    except UnknownWorkflowError as exc:
        return f"Its run is refused: {exc}." if engine.workflows else None
    except (ValueError, TypeError) as exc:
        return f"Its run is refused: its arguments, {schedule.args} {schedule.kwargs}, do not fit: {exc}."
    return None


def _last(schedule: Schedule) -> str | None:
    if schedule.last_run_at is None:
        return None
    run = f" with run {schedule.run_id[:8]}, which is {schedule.run_status}" if schedule.run_id else ""
    return f"It fired last at {since(schedule.last_run_at, schedule.now)}{run}; {count(schedule.fired, 'time')} in all."
