"""The proxy model of schedules: no table of its own."""

from __future__ import annotations

from typing import Any

from django.db import migrations


class Migration(migrations.Migration):
    initial = True
    dependencies = [("django_celery_beat", "0019_alter_periodictasks_options")]
    operations: list[Any] = [
        migrations.CreateModel(
            name="Schedule",
            fields=[],
            options={
                "verbose_name": "schedule",
                "verbose_name_plural": "schedules",
                "proxy": True,
                "indexes": [],
                "constraints": [],
            },
            bases=("django_celery_beat.periodictask",),
        ),
    ]
