"""The Django application of schedules, and the admin that shows them first."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.contrib.admin import AdminSite
from django.contrib.admin.apps import AdminConfig
from django.http import HttpRequest


class BeatConfig(AppConfig):
    name = "beat"
    verbose_name = "Workflows"


class ScheduleAdminConfig(AdminConfig):
    default_site = "beat.apps.ScheduleAdminSite"


class ScheduleAdminSite(AdminSite):
    site_header = site_title = "Byrd schedules"
    index_title = "Schedules"
    site_url = None

    def get_app_list(self, request: HttpRequest, app_label: str | None = None) -> Any:
        apps = super().get_app_list(request, app_label)
        order = {"beat": 0, "django_celery_beat": 1}
        return sorted(apps, key=lambda app: order.get(app["app_label"], 2))
