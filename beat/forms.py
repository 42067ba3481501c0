"""The form of a schedule: a workflow, its arguments in JSON, and when it is due, all on one page."""

from __future__ import annotations

import json
from typing import Any
from zoneinfo import available_timezones

from django import forms
from django.conf import settings
from django.contrib.admin.widgets import AdminSplitDateTime
from django_celery_beat.models import ClockedSchedule, CrontabSchedule, IntervalSchedule

from beat import SUBMIT_TASK
from beat.calls import Call, check_call, check_signature, read_call, read_json
from beat.cron import CronError, parse_cron, write_cron
from beat.models import Schedule
from beat.workflows import known_workflows
from byrd.errors import ArgumentError

PERIODS = [(name, name) for name in ("seconds", "minutes", "hours", "days")]
WAYS = {"cron": "crontab", "every": "interval", "at": "clocked", "solar": "solar"}  # field of the form: of the model


class JsonField(forms.CharField):
    """A JSON value of one type; its errors say what is wrong and where."""

    def __init__(self, kind: type, *, kind_name: str, **options: Any) -> None:
        self.kind, self.kind_name = kind, kind_name
        super().__init__(required=False, widget=forms.Textarea({"rows": 2, "spellcheck": "false"}), **options)

    def clean(self, value: Any) -> Any:
        text = super().clean(value)
        if not text:
            return self.kind()
        try:
            parsed = read_json(text)
        except ArgumentError as error:
            raise forms.ValidationError(str(error)) from None
        if not isinstance(parsed, self.kind):
            raise forms.ValidationError(f"This has to be a JSON {self.kind_name}.")
        return parsed


class ScheduleForm(forms.ModelForm):
    workflow = forms.CharField(max_length=200)
    arguments = JsonField(
        list, kind_name="list", label="Arguments", help_text='Positional arguments, a JSON list. Example: [42, "a"]'
    )
    keyword_arguments = JsonField(
        dict, kind_name="object", help_text='Keyword arguments, a JSON object. Example: {"dry_run": true}'
    )
    cron = forms.CharField(
        required=False,
        max_length=400,
        label="Crontab",
        widget=forms.TextInput({"placeholder": "*/15 9-17 * * mon-fri", "spellcheck": "false"}),
        help_text=(
            "Minute, hour, day of the month, month and weekday, which all have to match; or @hourly, @daily, @weekly, "
            "@monthly, @yearly."
        ),
    )
    timezone = forms.ChoiceField(
        required=False,
        label="Crontab's time zone",
        choices=[(name, name) for name in sorted(available_timezones())],
        initial=settings.TIME_ZONE,
    )
    every = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=1_000_000,
        help_text="Counted from the start, if one is set below, or else from midnight UTC on 1 January 1970.",
    )
    period = forms.ChoiceField(required=False, choices=PERIODS, initial="minutes", label="Unit")
    at = forms.SplitDateTimeField(
        required=False,
        label="Once at",
        widget=AdminSplitDateTime(),
        help_text=f"In {settings.TIME_ZONE}. A time that has passed is due at once.",
    )

    class Meta:
        model = Schedule
        fields = (
            "name",
            "enabled",
            "solar",
            "start_time",
            "expires",
            "expire_seconds",
            "one_off",
            "description",
        )
        labels = {
            "enabled": "Active",
            "solar": "Solar event",
            "start_time": "Start",
            "expires": "End",
            "expire_seconds": "Drop if late by",
            "one_off": "Once only",
        }
        help_texts = {
            "name": "What the schedule is for, in a few words.",
            "enabled": "A schedule that is not active is paused: its due times pass, and are not made up for.",
            "solar": "Sunrise, sunset and the like, at a place.",
            "description": "",
            "start_time": "Nothing is due before.",
            "expires": "Nothing is due from then on.",
            "expire_seconds": (
                "Seconds. Of the due times that pass while no beat runs, the latest is made up for once one runs, "
                "unless it is older than this."
            ),
            "one_off": "Pauses itself after its first run.",
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._show_call()
        self._show_timing()
        self.known = known = known_workflows()
        if known is None:
            why = f"The workflows of {settings.BYRD_APP} cannot be listed (the log says why): write the name."
            self.fields["workflow"].help_text = why
        else:
            names = sorted({*known, self.initial.get("workflow", "")} - {""})
            choices = [("", "---------"), *((name, name) for name in names)]
            self.fields["workflow"] = forms.ChoiceField(
                choices=choices, help_text=f"One of the workflows of {settings.BYRD_APP}."
            )

    def _show_call(self) -> None:
        if not self.instance.pk:
            return
        try:
            call = read_call(self.instance)
        except ArgumentError:  # a row that somebody else wrote: the form asks for the call anew
            return
        self.initial.update(
            workflow=call.workflow,
            arguments=json.dumps(call.args, ensure_ascii=False) if call.args else "",
            keyword_arguments=json.dumps(call.kwargs, ensure_ascii=False) if call.kwargs else "",
        )

    def _show_timing(self) -> None:
        row = self.instance
        if row.crontab:
            self.initial.update(cron=write_cron(row.crontab), timezone=str(row.crontab.timezone))
        if row.interval:
            self.initial.update(every=row.interval.every, period=row.interval.period)
            self.fields["period"].choices = dict([*PERIODS, (row.interval.period, row.interval.period)]).items()
        if row.clocked:
            self.initial.update(at=row.clocked.clocked_time)

    def clean_cron(self) -> dict[str, str] | None:
        text = self.cleaned_data["cron"]
        try:
            return parse_cron(text) if text else None
        except CronError as error:
            raise forms.ValidationError(str(error)) from None

    def clean(self) -> dict[str, Any]:
        data: dict[str, Any] = super().clean()
        self._clean_call(data)
        self._clean_timing(data)
        if data.get("expires") and data.get("expire_seconds") is not None:
            self.add_error("expire_seconds", "A schedule that ends cannot also drop late runs: choose one.")
        return data

    def _clean_call(self, data: dict[str, Any]) -> None:
        if not {"workflow", "arguments", "keyword_arguments"} <= data.keys():
            return
        call = Call(data["workflow"], data["arguments"], data["keyword_arguments"])
        try:
            check_call(call)
        except ArgumentError as error:
            self.add_error("keyword_arguments", str(error))
        else:
            self._clean_signature(call)
        self.instance.task = SUBMIT_TASK
        self.instance.args = json.dumps([call.workflow, *call.args])
        self.instance.kwargs = json.dumps(call.kwargs)

    def _clean_signature(self, call: Call) -> None:
        if (workflow := (self.known or {}).get(call.workflow)) is None:
            return
        try:
            check_signature(call, workflow)
        except ArgumentError as error:
            self.add_error("arguments", str(error))

    def _clean_timing(self, data: dict[str, Any]) -> None:
        if not self.errors.keys().isdisjoint(WAYS):
            return
        given = [way for way in WAYS if data.get(way)]
        if not given:
            self.add_error("cron", "Say when: a crontab, an interval, a date, or a solar event.")
        for way in given[1:]:
            self.add_error(way, "Choose one: a crontab, an interval, a date, or a solar event.")
        if data.get("at"):
            data["one_off"] = True
        row = self.instance
        row.crontab = CrontabSchedule(**data["cron"], timezone=self._timezone(data)) if data.get("cron") else None
        row.interval = IntervalSchedule(every=data["every"], period=data["period"]) if data.get("every") else None
        row.clocked = ClockedSchedule(clocked_time=data["at"]) if data.get("at") else None

    def validate_unique(self) -> None:
        if self.errors.keys().isdisjoint(WAYS):  # or django-celery-beat would add that no timing is set
            super().validate_unique()

    def _timezone(self, data: dict[str, Any]) -> str:
        return str(data.get("timezone") or settings.TIME_ZONE)

    def save(self, commit: bool = True) -> Any:  # noqa: FBT001, FBT002 (Django's signature)
        row = self.instance
        for name in ("crontab", "interval", "clocked"):
            chosen = getattr(row, name)
            if chosen is not None and chosen.pk is None:
                setattr(row, name, _shared(chosen))
        return super().save(commit)


def _shared(chosen: Any) -> Any:
    """The row that says the same as `chosen`, made if there is none: schedules share their timings."""
    fields = {field.name: getattr(chosen, field.name) for field in chosen._meta.fields if not field.primary_key}  # noqa: SLF001
    model = type(chosen)
    return model.objects.filter(**fields).first() or model.objects.create(**fields)
