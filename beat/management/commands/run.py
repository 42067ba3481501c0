"""``run``: everything at once, for one machine: migrates, makes the first user, serves the admin."""

from __future__ import annotations

import os
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management import call_command

from beat.management.commands.web import Command as WebCommand


class Command(WebCommand):
    help = (
        "Migrate, create the superuser of DJANGO_SUPERUSER_USERNAME and DJANGO_SUPERUSER_PASSWORD unless there is one "
        "of that name, and serve the admin."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        call_command("migrate", verbosity=0, interactive=False)
        name = os.environ.get("DJANGO_SUPERUSER_USERNAME")
        if name and not get_user_model().objects.filter(username=name).exists():
            os.environ.setdefault("DJANGO_SUPERUSER_EMAIL", "")
            call_command("createsuperuser", interactive=False)
        super().handle(*args, **options)
