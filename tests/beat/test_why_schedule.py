"""`byrd why SCHEDULE` says why a schedule submits nothing, or when it will."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from click.testing import CliRunner

from byrd.cli import main
from tests.beat.conftest import APP, Process, libpq_url, wait_until
from tests.cluster import open_cluster

TIME = r"(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d"
SINCE = rf"{TIME} \([^)]+ ago\)"


@pytest.fixture
def why(schedules_url: str, broker_url: str, tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """Ask `byrd why`, with the app of these tests on this test's database."""

    def ask(name: str) -> list[str]:
        found = CliRunner().invoke(main, ["-A", f"{APP}:app", "why", name, "--json"])
        reasons: list[str] = json.loads(found.stdout).get("reasons") or [found.stdout]
        return reasons

    with open_cluster(database_url=schedules_url, broker_url=broker_url, folder=tmp_path) as cluster:
        cluster.app(APP)
        yield ask


def schedule(name: str, *args: Any, task: str = "byrd.submit", **fields: Any) -> Any:
    from django_celery_beat.models import PeriodicTask

    call = json.dumps(args or ["shop.tick", name])
    return PeriodicTask.objects.create(**{"name": name, "task": task, "args": call, **fields})


def every(seconds: int) -> Any:
    from django_celery_beat.models import IntervalSchedule

    return IntervalSchedule.objects.get_or_create(every=seconds, period=IntervalSchedule.SECONDS)[0]


def crontab(cron: str, timezone: str = "UTC") -> Any:
    from django_celery_beat.models import CrontabSchedule

    from beat.cron import parse_cron

    return CrontabSchedule.objects.get_or_create(**parse_cron(cron), timezone=timezone)[0]


def clocked(at: datetime) -> Any:
    from django_celery_beat.models import ClockedSchedule

    return ClockedSchedule.objects.get_or_create(clocked_time=at)[0]


def is_said(sentences: list[str], *patterns: str) -> None:
    assert len(sentences) == len(patterns), sentences
    for sentence, pattern in zip(sentences, patterns, strict=True):
        assert re.fullmatch(pattern, sentence), f"{sentence!r} is not {pattern!r}"


def test_paused_due_ended_and_refused(why: Callable[[str], list[str]]) -> None:
    now = datetime.now(UTC)
    schedule("paused", crontab=crontab("30 4 * * 1", "Europe/Berlin"), enabled=False)
    is_said(
        why("paused"),
        rf"It is paused since {SINCE}: it submits nothing \(30 4 \* \* 1 Europe/Berlin\) until it is resumed in the "
        r"admin\.",
    )
    schedule("hourly", interval=every(3600))
    is_said(why("hourly"), rf"It is active \(every 3,600 seconds\), and due at {TIME} \(in .* min.*\)\.")
    schedule("once", clocked=clocked(now + timedelta(days=400)), one_off=True)
    is_said(why("once"), rf"It is active \(once, at {TIME}\), and due at {TIME} \(in (399|400) days\)\.")
    schedule("expired", interval=every(3600), expires=now - timedelta(hours=1))
    is_said(why("expired"), rf"It expired at {TIME}, so it submits nothing any more\.")
    schedule("unknown", "shop.tock", interval=every(3600))
    is_said(why("unknown"), "It is active .*", r"Its run is refused: no workflow is called 'shop.tock'; .*")
    schedule("unfit", "shop.tick", 1, 2, 3, interval=every(3600))
    is_said(why("unfit"), "It is active .*", r"Its run is refused: its arguments, .*, do not fit: too many .*")
    schedule("ordinary", task="shop.note", interval=every(3600))
    assert "no run has the id ordinary" in why("ordinary")[0]


def act(action: str, *tasks: Any, model: str = "beat_schedule", by: str = "alice") -> None:
    """Have a person choose an action for schedules in the admin."""
    chosen = {"action": action, "_selected_action": [task.pk for task in tasks]}
    post(f"admin:{model}_changelist", chosen, by=by)


def post(name: str, data: dict[str, Any], *args: Any, by: str) -> None:
    """Have a person send a form of the admin."""
    from django.contrib.auth.models import User
    from django.test import Client
    from django.urls import reverse

    client = Client(headers={"host": "localhost"})
    client.force_login(User.objects.filter(username=by).first() or User.objects.create_superuser(by))
    answer = client.post(reverse(name, args=args), data)
    assert answer.status_code == 302, answer.content.decode()


def test_who_paused_it_in_the_admin(why: Callable[[str], list[str]]) -> None:
    from django_celery_beat.models import PeriodicTask

    def says(by: str, what: str = "switched it last") -> bool:
        [said] = why("daily")
        pattern = (
            rf"It is paused since {SINCE}: .* resumed in the admin, whose history says that {by} {what} at {SINCE}\."
        )
        return re.fullmatch(pattern, said) is not None

    form = {"name": "daily", "workflow": "shop.tick", "cron": "0 4 * * *", "timezone": "UTC"}
    post("admin:beat_schedule_add", form, by="alice")
    assert says("alice", "added it")
    task = PeriodicTask.objects.get(name="daily")
    act("resume", task, by="bob")
    assert why("daily")[0].startswith("It is active")
    act("pause", task, by="carol")
    assert says("carol")
    act("pause", task, by="bob")  # changes nothing
    post("admin:beat_schedule_change", {**form, "description": "paused"}, task.pk, by="bob")
    assert says("carol")
    post("admin:beat_schedule_change", {**form, "enabled": "on"}, task.pk, by="bob")
    assert why("daily")[0].startswith("It is active")
    post("admin:beat_schedule_change", form, task.pk, by="dave")
    assert says("dave")
    for action, by in (
        ("enable_tasks", "bob"),
        ("disable_tasks", "erin"),
        ("toggle_tasks", "bob"),
        ("toggle_tasks", "al"),
    ):
        act(action, task, model="django_celery_beat_periodictask", by=by)
        assert why("daily")[0].startswith("It is active") if by == "bob" else says(by)
    ordinary = {"name": "daily", "task": "byrd.submit", "crontab": task.crontab_id, "args": task.args, "kwargs": "{}"}
    post("admin:django_celery_beat_periodictask_change", {**ordinary, "enabled": "on"}, task.pk, by="bob")
    post("admin:django_celery_beat_periodictask_change", ordinary, task.pk, by="frank")
    assert says("frank")


@pytest.mark.parametrize("missing", ["django_admin_log", "auth_user"])
def test_it_says_nobody_s_name_without_the_admin_s_tables(
    why: Callable[[str], list[str]], schedules_url: str, missing: str
) -> None:
    task = schedule("daily", crontab=crontab("0 4 * * *"))
    act("pause", task)
    assert "says that alice switched it last" in why("daily")[0]
    with closing(psycopg2.connect(libpq_url(schedules_url))) as connection, connection, connection.cursor() as cursor:
        cursor.execute(f"DROP TABLE beat.{missing} CASCADE")
    is_said(why("daily"), rf"It is paused since {SINCE}: .* until it is resumed in the admin\.")


def test_a_crontab_is_due_when_beat_will_fire_it(why: Callable[[str], list[str]]) -> None:
    from beat.timetable import due_times_of

    for number, cron in enumerate(("*/5 * * * *", "0 4 * * *", "15 2 1 * *", "30 23 * * 0")):
        task = schedule(f"cron{number}", crontab=crontab(cron, "Europe/Berlin"))
        due = due_times_of(task).following(datetime.now(UTC))
        assert due is not None
        local = due.astimezone()
        [said] = why(task.name)
        shown = local.strftime(
            "%H:%M:%S" if local.date() == datetime.now().astimezone().date() else "%Y-%m-%d %H:%M:%S"
        )
        assert f"and due at {shown} (in " in said


def test_without_a_beat_it_says_so_and_with_one_what_was_fired(
    why: Callable[[str], list[str]], beat: Callable[[], Process]
) -> None:
    from django_celery_beat.models import PeriodicTask

    task = schedule("often", interval=every(2))
    long_ago = datetime.now(UTC) - timedelta(minutes=5)
    PeriodicTask.objects.filter(pk=task.pk).update(date_changed=long_ago)
    is_said(why("often"), rf"It was due at {SINCE}, and has not fired \(every 2 seconds\): no beat runs on this .*")
    beat()
    wait_until(lambda: why("often")[0].startswith("It is active"), "it fired")
    is_said(
        why("often"),
        r"It is active \(every 2 seconds\), and due at .*\.",
        rf"It fired last at {SINCE} with run [0-9a-f]{{8}}, which is running; \d+ times? in all\.",
    )
