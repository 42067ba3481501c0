"""Real beats on a real database: one run per due time, whatever is started twice, killed, paused or broken."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import psycopg2
import pytest
import redis

from byrd import embedded
from tests.beat.conftest import BEAT, Process, Start, call_migrate, cursor, django_on, libpq_url, rows, wait_until

Beat = Callable[[], Process]

RUNS = "SELECT key FROM byrd.runs WHERE key LIKE %s ORDER BY key"


def schedule(name: str, *args: Any, every: float | None = None, crontab: str | None = None, **fields: Any) -> Any:
    """A schedule of `shop.tick`, or of what the first argument names."""
    from django_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask

    from beat.cron import parse_cron

    if every is not None:
        fields["interval"], _ = IntervalSchedule.objects.get_or_create(every=every, period=IntervalSchedule.SECONDS)
    if crontab is not None:
        fields["crontab"], _ = CrontabSchedule.objects.get_or_create(**parse_cron(crontab), timezone="UTC")
    last_run_at = fields.pop("last_run_at", None)
    call = json.dumps(args or ["shop.tick", name])
    made = PeriodicTask.objects.create(**{"name": name, "task": "byrd.submit", "args": call, **fields})
    if last_run_at is not None:
        PeriodicTask.objects.filter(pk=made.pk).update(last_run_at=last_run_at)
    return made


def due_times(url: str, task: Any) -> list[datetime]:
    """For which due times the schedule has submitted runs."""
    prefix = f"schedule:{task.pk}:"
    return [datetime.fromisoformat(key.removeprefix(prefix)) for key in rows(url, RUNS, f"{prefix}%")]


def fired(url: str, task: Any, count: int) -> list[datetime]:
    def enough() -> list[datetime]:
        found = due_times(url, task)
        return found if len(found) >= count else []

    return wait_until(enough, f"{task.name} fired {count} times")


def test_two_beats_fire_each_due_time_once(schedules_url: str, beat: Beat) -> None:
    task = schedule("often", every=2)
    beats = [beat(), beat()]
    wait_until(lambda: all("beat: Starting" in one.text() for one in beats), "both beats started")
    fired(schedules_url, task, len(due_times(schedules_url, task)) + 4)
    assert [one.stop() for one in beats] == [0, 0]
    found = due_times(schedules_url, task)
    task.refresh_from_db()
    assert len(rows(schedules_url, "SELECT id FROM byrd.runs")) == len(set(found)) == task.total_run_count
    assert {later - earlier for earlier, later in pairwise(found[-4:])} == {timedelta(seconds=2)}


@contextmanager
def held_while_it_fires(url: str, table: str, mode: str) -> Iterator[tuple[Any, datetime]]:
    """Have the beat that runs wait for a lock in the middle of firing a schedule; yield this and its due time."""
    witness = schedule("witness", every=1)
    fired(url, witness, 1)
    due = (datetime.now(UTC) + timedelta(seconds=3)).replace(microsecond=0)
    task = schedule("daily", every=86_400, start_time=due)
    witness.delete()
    with closing(psycopg2.connect(url)) as blocker, blocker.cursor() as locks:
        locks.execute(f"LOCK TABLE {table} IN {mode} MODE")
        wait_until(lambda: rows(url, WAITING, table), "the beat waits while it fires")
        yield task, due
        blocker.rollback()


@pytest.mark.parametrize(
    ("table", "mode"),
    [
        pytest.param("byrd.runs", "ACCESS EXCLUSIVE", id="before the submission"),
        pytest.param("beat.django_celery_beat_periodictask", "SHARE", id="after the submission"),
    ],
)
def test_a_beat_killed_while_it_fires_neither_loses_nor_repeats_the_due_time(
    schedules_url: str, beat: Beat, table: str, mode: str
) -> None:
    first = beat()
    with held_while_it_fires(schedules_url, table, mode) as (task, due):
        first.kill()
        second = beat()
        wait_until(lambda: "beat: Starting" in second.text(), "the second beat started")
    witness = schedule("another witness", every=1)
    fired(schedules_url, witness, 3)
    assert due_times(schedules_url, task) == [due]
    task.refresh_from_db()
    assert task.total_run_count == 1


def test_a_beat_that_is_told_to_stop_while_it_fires_records_that_first(schedules_url: str, beat: Beat) -> None:
    first = beat()
    with held_while_it_fires(schedules_url, "beat.django_celery_beat_periodictask", "SHARE") as (task, due):
        first.popen.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            first.popen.wait(1)
    assert first.popen.wait(30) == 0
    assert due_times(schedules_url, task) == [due]
    task.refresh_from_db()
    assert task.total_run_count == 1


WAITING = "SELECT pid FROM pg_locks WHERE NOT granted AND relation = %s::regclass"


def test_of_what_a_dead_beat_missed_the_latest_due_time_is_made_up_for_once(schedules_url: str, beat: Beat) -> None:
    now = datetime.now(UTC)
    latest = (now - timedelta(minutes=30)).replace(microsecond=0)
    task = schedule(
        "daily", every=86_400, start_time=latest - timedelta(days=9), last_run_at=now - timedelta(days=3, minutes=1)
    )
    witness = schedule("witness", every=1)
    first = beat()
    assert fired(schedules_url, task, 1) == [latest]
    first.kill()  # and not stopped: nothing that it still had in memory is written
    already = len(due_times(schedules_url, witness))
    beat()
    fired(schedules_url, witness, already + 2)
    assert due_times(schedules_url, task) == [latest]


def test_a_crontab_far_from_the_servers_hour_is_made_up_for_too(schedules_url: str, beat: Beat) -> None:
    now = datetime.now(UTC)
    latest = (now - timedelta(hours=11)).replace(minute=0, second=0, microsecond=0)
    task = schedule("nightly", crontab=f"0 {latest.hour} * * *", last_run_at=now - timedelta(days=2))
    beat()
    assert fired(schedules_url, task, 1) == [latest]


def test_a_paused_schedule_does_not_fire_and_what_it_missed_is_not_made_up_for(schedules_url: str, beat: Beat) -> None:
    task, witness = schedule("pausing", every=1), schedule("witness", every=1)
    beat()
    fired(schedules_url, task, 2)
    task.refresh_from_db()
    task.enabled = False
    task.save()
    before = due_times(schedules_url, task)
    paused = fired(schedules_url, witness, len(due_times(schedules_url, witness)) + 3)
    assert due_times(schedules_url, task) == before
    task.enabled = True
    task.save()
    resumed_at = task.date_changed
    after = fired(schedules_url, task, len(before) + 1)
    assert after[len(before)] > resumed_at > paused[-1] > before[-1]


def test_limits_of_a_schedule_are_kept(schedules_url: str, beat: Beat) -> None:
    now = datetime.now(UTC)
    once = schedule("once", every=1, one_off=True)
    ended = schedule("ended", every=1, expires=now - timedelta(seconds=1), last_run_at=now - timedelta(hours=1))
    not_yet = schedule("not yet", every=1, start_time=now + timedelta(days=1), last_run_at=now - timedelta(hours=1))
    missed: dict[str, Any] = dict(
        every=86_400, start_time=now - timedelta(hours=1), last_run_at=now - timedelta(hours=2)
    )
    stale, made_up = schedule("stale", **missed, expire_seconds=600), schedule("made up", **missed, expire_seconds=7200)
    from_now = schedule("from now", every=1, start_time=(now + timedelta(seconds=4)).replace(microsecond=0))
    witness = schedule("witness", every=1)
    beat()
    started = fired(schedules_url, from_now, 2)
    fired(schedules_url, witness, 3)
    assert started[0] >= from_now.start_time
    assert due_times(schedules_url, made_up) == [made_up.start_time]
    assert len(due_times(schedules_url, once)) == 1
    for silent in (ended, not_yet, stale):
        assert due_times(schedules_url, silent) == []
    for task in (once, ended):
        task.refresh_from_db()
        assert not task.enabled
    assert once.total_run_count == 1


def test_a_single_date_is_fired_once_and_at_once_if_it_has_passed(schedules_url: str, beat: Beat) -> None:
    from django_celery_beat.models import ClockedSchedule

    past, soon = (datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (-60, 5))
    clocked = [ClockedSchedule.objects.create(clocked_time=at) for at in (past, soon)]
    tasks = [schedule(f"at {one.clocked_time}", one_off=True, clocked=one) for one in clocked]
    beat()
    assert [fired(schedules_url, task, 1) for task in tasks] == [[past], [soon]]
    wait_until(lambda: not rows(schedules_url, ENABLED, [task.pk for task in tasks]), "both schedules have ended")


ENABLED = "SELECT id FROM beat.django_celery_beat_periodictask WHERE enabled AND id = ANY(%s)"


def test_a_schedule_that_cannot_be_submitted_is_named_and_stops_no_other(schedules_url: str, beat: Beat) -> None:
    broken = [
        schedule("unknown workflow", "shop.nothing", every=1),
        schedule("no workflow", 42, every=1),
        schedule("wrong arguments", "shop.tick", 1, 2, 3, every=1),
        schedule("reserved", every=1, kwargs='{"key": "mine"}'),
    ]
    unreadable = schedule("no such hour", every=1)
    type(unreadable).objects.filter(pk=unreadable.pk).update(interval=None)
    witness = schedule("witness", every=1)
    one = beat()
    fired(schedules_url, witness, 4)
    complaints = {f"Schedule {task.name} cannot submit its run: " for task in broken}
    wait_until(lambda: all(complaint in one.text() for complaint in complaints), "each is named")
    for task in broken:
        assert due_times(schedules_url, task) == []
    assert "Schedule no such hour is left out" in one.text()
    assert "shop.nothing" in one.text()


def test_ordinary_periodic_tasks_are_sent_as_messages(schedules_url: str, broker_url: str, beat: Beat) -> None:
    task = schedule("ordinary", "a label", every=1, task="tests.beat.shop.note")
    beat()
    with redis.Redis.from_url(broker_url) as broker:
        message = wait_until(lambda: broker.lindex("celery", 0), "a message is in the queue")
    headers = json.loads(message)["headers"]
    assert (headers["task"], headers["periodic_task_name"]) == ("tests.beat.shop.note", "ordinary")
    assert due_times(schedules_url, task) == []


def test_a_beat_that_starts_before_the_migration_waits_for_it(schedules_url: str, beat: Beat) -> None:
    with cursor(schedules_url) as tables:
        tables.execute("DROP SCHEMA beat CASCADE")
    one = beat()
    wait_until(lambda: "run `python -m beat migrate`" in one.text(), "the beat says what is missing")
    call_migrate()
    fired(schedules_url, schedule("late", every=1), 1)


def test_a_beat_outlives_a_restart_of_postgres(
    own_postgres: embedded.EmbeddedPostgres, schedules_url: str, start: Start
) -> None:
    url = libpq_url(own_postgres.url)
    with django_on(url):
        call_migrate()
        task = schedule("lasting", every=1)
    one = start(*BEAT, BYRD_DATABASE_URL=url)
    fired(url, task, 2)
    own_postgres.restart()
    fired(url, task, len(due_times(url, task)) + 3)
    assert one.popen.poll() is None
    own_postgres.kill()
    wait_until(lambda: "Postgres does not answer" in one.text(), "the beat has noticed")
    own_postgres.start()
    fired(url, task, len(due_times(url, task)) + 3)
    assert one.stop() == 0
