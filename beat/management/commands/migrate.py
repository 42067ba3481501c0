"""``migrate``, with the schema made first and one migration at a time."""

from __future__ import annotations

from typing import Any

from django.core.management.commands.migrate import Command as MigrateCommand
from django.db import connections

from beat.environment import SCHEMA

_LOCK = 0x62656174  # "beat"; a session's advisory lock, so that it covers all transactions of the migration


class Command(MigrateCommand):
    def handle(self, *args: Any, **options: Any) -> None:
        with connections[options["database"]].cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
            try:
                cursor.execute(f'CREATE SCHEMA IF NOT EXISTS "{SCHEMA}"')
                super().handle(*args, **options)
            finally:
                cursor.execute("SELECT pg_advisory_unlock(%s)", [_LOCK])
