"""The admin of schedules, and django-celery-beat's own for periodic tasks of other kinds."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.db import DatabaseError
from django.db.models import Case, Value, When
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html
from django_celery_beat.admin import PeriodicTaskAdmin
from django_celery_beat.models import PeriodicTask, PeriodicTasks

from beat.calls import read_call
from beat.cron import write_cron
from beat.forms import ScheduleForm
from beat.models import Schedule
from beat.timetable import due_times_of
from beat.workflows import engine
from byrd.errors import ByrdError

_TIMING = {"cron", "timezone", "every", "period", "at", "solar", "start_time", "enabled"}


@admin.register(Schedule)
class ScheduleAdmin(admin.ModelAdmin):
    form = ScheduleForm
    list_display = ("name", "workflow", "active", "when", "next_due", "last_run", "runs")
    list_select_related = ("crontab", "interval", "solar", "clocked")
    search_fields = ("name", "description", "args")
    ordering = ("name",)
    actions = ("pause", "resume", "submit_now")
    readonly_fields = ("next_due", "last_run", "runs")
    fieldsets: ClassVar[Any] = (
        (None, {"fields": ("name", "workflow", "arguments", "keyword_arguments", "enabled")}),
        (
            "When",
            {
                "fields": (("cron", "timezone"), ("every", "period"), "at", "solar"),
                "description": "Fill in one of the four.",
            },
        ),
        ("Limits", {"fields": ("start_time", "expires", "expire_seconds", "one_off")}),
        ("Notes", {"fields": ("description",)}),
        ("So far", {"fields": ("next_due", "last_run", "runs")}),
    )

    @admin.display(description="workflow", ordering="args")
    def workflow(self, schedule: Schedule) -> str:
        return schedule.workflow or "(unreadable)"

    @admin.display(boolean=True, ordering="enabled")
    def active(self, schedule: Schedule) -> bool:
        return bool(schedule.enabled)

    @admin.display
    def when(self, schedule: Schedule) -> str:
        if schedule.clocked:
            return f"once, at {_shown(schedule.clocked.clocked_time)}"
        if not schedule.crontab:
            return str(schedule.scheduler)
        written = f"{write_cron(schedule.crontab)} {schedule.crontab.timezone}"
        return str(format_html('<span title="{}">{}</span>', schedule.crontab.human_readable, written))

    @admin.display(description="last run", ordering="last_run_at")
    def last_run(self, schedule: Schedule) -> str | None:
        return _shown(schedule.last_run_at)

    @admin.display(ordering="total_run_count")
    def runs(self, schedule: Schedule) -> int:
        return int(schedule.total_run_count)

    @admin.display(description="next due", empty_value="never")
    def next_due(self, schedule: Schedule) -> str | None:
        if not schedule.pk:
            return "once it is saved"
        if not schedule.enabled:
            return "paused"
        now = timezone.now()
        try:
            due_times = due_times_of(schedule)
            return _shown(due_times.due(now) or due_times.following(now))
        except Exception as error:  # noqa: BLE001 (one row that somebody broke must not hide the others)
            return f"unreadable: {error}"

    @admin.action(description="Pause selected schedules", permissions=["change"])
    def pause(self, request: HttpRequest, queryset: Any) -> None:
        active = queryset.filter(enabled=True)
        _log_switch(request, active)
        count = active.update(enabled=False, last_run_at=None, date_changed=timezone.now())
        PeriodicTasks.update_changed()
        self.message_user(request, f"Paused: {count}.")

    @admin.action(description="Resume selected schedules", permissions=["change"])
    def resume(self, request: HttpRequest, queryset: Any) -> None:
        # What was due meanwhile counts as done: `date_changed` is where a schedule without a last run starts.
        paused = queryset.filter(enabled=False)
        _log_switch(request, paused)
        count = paused.update(enabled=True, last_run_at=None, date_changed=timezone.now())
        PeriodicTasks.update_changed()
        self.message_user(request, f"Resumed: {count}.")

    @admin.action(description="Submit a run of selected schedules now", permissions=["change"])
    def submit_now(self, request: HttpRequest, queryset: Any) -> None:
        for schedule in queryset:
            try:
                call = read_call(schedule)
                run = engine().submit(call.workflow, *call.args, **call.kwargs)
            except (ByrdError, DatabaseError) as error:
                self.message_user(request, f"{schedule.name}: {error}", messages.ERROR)
            else:
                self.message_user(request, f"{schedule.name}: run {run.id}", messages.SUCCESS)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:  # noqa: FBT001
        if change and not _TIMING.isdisjoint(form.changed_data):
            obj.last_run_at = None  # the new timing starts now: what it would have been due before is not made up for
        super().save_model(request, obj, form, change)

    def delete_queryset(self, request: HttpRequest, queryset: Any) -> None:
        super().delete_queryset(request, queryset)
        PeriodicTasks.update_changed()  # django-celery-beat's signal knows its own model only, not the proxy


def _log_switch(request: HttpRequest, queryset: Any) -> None:
    """Leave in the admin's history who pauses or resumes, as a change in the form does: ``byrd why`` tells it."""
    LogEntry.objects.log_actions(request.user.pk, queryset.all(), CHANGE, [{"changed": {"fields": ["Active"]}}])


def _shown(moment: datetime | None) -> str | None:
    return None if moment is None else str(timezone.localtime(moment).strftime("%Y-%m-%d %H:%M:%S"))


admin.site.unregister(PeriodicTask)


@admin.register(PeriodicTask)
class OrdinaryTaskAdmin(PeriodicTaskAdmin):
    """django-celery-beat's admin, whose switches tell a pause from an outage: only what this missed is made up for."""

    @admin.action(description="Enable selected tasks")
    def enable_tasks(self, request: HttpRequest, queryset: Any) -> None:
        self._switch(request, queryset.filter(enabled=False))
        super().enable_tasks(request, queryset)

    @admin.action(description="Disable selected tasks")
    def disable_tasks(self, request: HttpRequest, queryset: Any) -> None:
        self._switch(request, queryset.filter(enabled=True))
        super().disable_tasks(request, queryset)

    @admin.action(description="Toggle activity of selected tasks")
    def toggle_tasks(self, request: HttpRequest, queryset: Any) -> None:
        self._switch(request, queryset)
        super().toggle_tasks(request, queryset)

    def _switch(self, request: HttpRequest, queryset: Any) -> None:
        _log_switch(request, queryset)
        queryset.update(date_changed=timezone.now())

    def _toggle_tasks_activity(self, queryset: Any) -> Any:
        switched = Case(When(enabled=True, then=Value(False)), default=Value(True))
        return queryset.update(enabled=switched, last_run_at=None)
