"""The form of a schedule: each way to say when, and each way to get it wrong."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from beat import SUBMIT_TASK

pytestmark = pytest.mark.usefixtures("schedules_url")

GOOD = {"name": "a schedule", "workflow": "shop.tick", "enabled": "on", "cron": "0 4 * * *", "timezone": "Europe/Paris"}


def form(instance: Any = None, **data: Any) -> Any:
    from beat.forms import ScheduleForm

    filled = {name: value for name, value in {**GOOD, **data}.items() if value is not None}
    return ScheduleForm(filled, instance=instance)


def saved(instance: Any = None, **data: Any) -> Any:
    found = form(instance, **data)
    assert found.is_valid(), found.errors
    return found.save()


def test_a_crontab_and_arguments_become_a_periodic_task() -> None:
    schedule = saved(arguments='["né"]', keyword_arguments='{"loud": true}')
    assert schedule.task == SUBMIT_TASK
    assert json.loads(schedule.args) == ["shop.tick", "né"]
    assert json.loads(schedule.kwargs) == {"loud": True}
    assert str(schedule.crontab) == "0 4 * * * (m/h/dM/MY/d) Europe/Paris"
    assert schedule.interval is schedule.clocked is schedule.solar is None
    assert schedule.workflow == "shop.tick"


def test_an_interval_or_a_date_may_be_chosen_instead() -> None:
    every = saved(name="every", cron=None, every="5", period="hours")
    assert (every.interval.every, every.interval.period) == (5, "hours")
    once = saved(name="once", cron=None, at_0="2030-01-01", at_1="12:30")
    assert once.clocked.clocked_time == datetime(2030, 1, 1, 12, 30, tzinfo=UTC)
    assert once.one_off


def test_schedules_with_the_same_timing_share_its_row_and_changing_one_leaves_the_other() -> None:
    first, second = saved(name="first"), saved(name="second")
    assert first.crontab_id == second.crontab_id
    changed = saved(first, name="first", cron="0 5 * * *")
    second.refresh_from_db()
    assert (changed.pk, changed.crontab.hour, second.crontab.hour) == (first.pk, "5", "4")


def test_the_form_shows_what_was_saved() -> None:
    from beat.forms import ScheduleForm

    schedule = saved(arguments='["x"]', keyword_arguments='{"loud": true}', cron="*/5 9-17 * * mon-fri")
    initial = ScheduleForm(instance=schedule).initial
    assert initial["workflow"] == "shop.tick"
    assert (initial["arguments"], initial["keyword_arguments"]) == ('["x"]', '{"loud": true}')
    assert (initial["cron"], initial["timezone"]) == ("*/5 9-17 * * mon-fri", "Europe/Paris")


@pytest.mark.parametrize(
    ("field", "data", "complaint"),
    [
        ("cron", {"cron": "61 * * * *"}, "'61' is no minute"),
        ("cron", {"cron": None}, "Say when"),
        ("every", {"every": "5", "period": "hours"}, "Choose one"),
        ("every", {"cron": None, "every": "0", "period": "hours"}, "greater than or equal to 1"),
        ("timezone", {"timezone": "Middle/Earth"}, "not one of the available choices"),
        ("workflow", {"workflow": "shop.nothing"}, "not one of the available choices"),
        ("workflow", {"workflow": None}, "required"),
        ("arguments", {"arguments": "[1,"}, "not JSON: Expecting value at line 1, column 4"),
        ("arguments", {"arguments": '{"a": 1}'}, "JSON list"),
        ("arguments", {"arguments": "[NaN]"}, "NaN is not JSON"),
        ("arguments", {"arguments": '["a\\u0000"]'}, "Postgres cannot store"),
        ("arguments", {"arguments": '["a\\ud800"]'}, "Postgres cannot store"),
        ("arguments", {"arguments": "[1, 2, 3]"}, "shop.tick(label='tick', *, loud=False) cannot be"),
        ("keyword_arguments", {"keyword_arguments": "[]"}, "JSON object"),
        ("keyword_arguments", {"keyword_arguments": '{"key": 1}'}, "cannot pass 'key'"),
        ("expire_seconds", {"expires": "2030-01-01 00:00", "expire_seconds": "60"}, "choose one"),
    ],
)
def test_what_is_wrong_is_said_at_its_field(field: str, data: dict[str, Any], complaint: str) -> None:
    found = form(**data)
    assert not found.is_valid()
    assert complaint in " ".join(found.errors.get(field, [])), found.errors
    assert "__all__" not in found.errors


def test_a_row_without_a_timing_is_shown_as_such() -> None:
    from django.contrib import admin
    from django_celery_beat.models import PeriodicTask

    from beat.models import Schedule

    schedule = saved()
    PeriodicTask.objects.filter(pk=schedule.pk).update(crontab=None)
    shown = admin.site._registry[Schedule].next_due(Schedule.objects.get(pk=schedule.pk))
    assert shown.startswith("unreadable: ")


def test_a_name_is_taken_once() -> None:
    saved()
    found = form()
    assert "already exists" in found.errors["name"][0]


def test_a_row_that_somebody_else_broke_can_be_opened_and_mended() -> None:
    from django_celery_beat.models import PeriodicTask

    schedule = saved()
    PeriodicTask.objects.filter(pk=schedule.pk).update(args="{not json")
    schedule.refresh_from_db()
    assert schedule.workflow == ""
    assert "shop.tick" in str(form(schedule)["workflow"])
    assert saved(schedule).workflow == "shop.tick"
