"""``python -m beat COMMAND``: migrate, createsuperuser, web, run, and every other command of Django."""

from __future__ import annotations

import os
import sys

from django.core.exceptions import ImproperlyConfigured
from django.core.management import ManagementUtility


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "beat.settings")
    utility = ManagementUtility(sys.argv)
    utility.prog_name = "python -m beat"
    try:
        utility.execute()
    except ImproperlyConfigured as error:
        sys.exit(f"python -m beat: {error}")


if __name__ == "__main__":
    main()
