"""Schedules: django-celery-beat's periodic tasks, seen as what submits a workflow."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import models
from django_celery_beat.models import PeriodicTask
from django_celery_beat.querysets import PeriodicTaskQuerySet

from beat import SUBMIT_TASK
from beat.calls import read_call
from byrd.errors import ArgumentError


class ScheduleManager(models.Manager.from_queryset(PeriodicTaskQuerySet)):  # type: ignore[misc]
    def get_queryset(self) -> Any:
        return super().get_queryset().filter(task=SUBMIT_TASK)


class Schedule(PeriodicTask):
    """A periodic task that submits the workflow named by its first argument."""

    objects: ClassVar[Any] = ScheduleManager()

    class Meta:
        proxy = True
        verbose_name = "schedule"
        verbose_name_plural = "schedules"

    def __str__(self) -> str:
        return str(self.name)

    @property
    def workflow(self) -> str:
        """The name of the workflow; empty if the row holds none."""
        try:
            return read_call(self).workflow
        except ArgumentError:
            return ""
