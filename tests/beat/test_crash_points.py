"""A schedule fires once, whichever boundary beat or the worker is killed at."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from byrd.testing import CrashPoints, boundary
from tests.beat.test_scheduler import due_times, schedule
from tests.cluster import ClusterFactory


@pytest.mark.timeout(1200)
@pytest.mark.byrd_crash_points(skip=r"^worker|keeper|sweeper")  # the workflow's own boundaries are those of any run
def test_a_schedule_fires(
    schedules_url: str, broker_url: str, cluster_on: ClusterFactory, byrd_crash_points: CrashPoints
) -> None:
    shop = cluster_on(database_url=schedules_url, broker_url=broker_url).app("tests.beat.shop")
    due = (datetime.now(UTC) - timedelta(minutes=1)).replace(microsecond=0)
    tasks: list[Any] = []

    def reset() -> None:
        from django_celery_beat.models import CrontabSchedule, PeriodicTask

        PeriodicTask.objects.all().delete()
        CrontabSchedule.objects.all().delete()  # Celery's own for its clean-up: each beat is the first one
        tasks[:] = [schedule("daily", every=86_400, start_time=due, last_run_at=due - timedelta(days=1))]

    def check(run: Any) -> None:
        [task] = tasks
        assert due_times(schedules_url, task) == [due]
        task.refresh_from_db()
        assert task.total_run_count == 1
        assert run.get(timeout=0) == "daily"

    report = byrd_crash_points(shop.engine, lambda: beat_once(shop.app), reset=reset, check=check)
    assert report.tried > 20
    assert any("django_celery_beat_periodictask" in name for name in report.boundaries)


def beat_once(app: Any) -> None:
    """Be a beat until nothing is due; what Django does with Postgres has boundaries, too."""
    from django.db import connection

    from beat.scheduler import ByrdScheduler

    connection.connection = None  # it is the test's, from which this process was forked
    commit = connection._commit

    def watched_commit() -> None:
        with boundary("Django's commit"):
            commit()

    def watched(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        title = re.sub(r"SAVEPOINT \S+", "SAVEPOINT", sql.replace('"', ""))
        with boundary(f"Django's {title[:100]}"):
            return execute(sql, params, many, context)

    connection._commit = watched_commit
    with connection.execute_wrapper(watched):
        scheduler = ByrdScheduler(app=app)
        while scheduler.tick() <= 0:
            pass
        scheduler.sync()
