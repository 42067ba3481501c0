"""What the admin knows of the Celery app whose workflows are scheduled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from celery import Celery
from celery.app.utils import find_app
from django.conf import settings

from byrd.errors import ConfigurationError

logger = logging.getLogger(__name__)


@cache  # also the failure: a broken module is not imported again at each page
def load_celery_app() -> Celery | None:
    """The app that BYRD_APP names; None, with the reason logged, if it cannot be imported."""
    try:
        return find_app(settings.BYRD_APP)
    except Exception:
        # Schedules can be seen and paused without the app; a broken deploy of it must not take the admin away too.
        logger.exception("BYRD_APP=%s cannot be imported, so workflows are entered by name", settings.BYRD_APP)
        return None


def engine() -> Any:
    """The Byrd of that app; ConfigurationError if there is none."""
    app = load_celery_app()
    found = getattr(app, "byrd", None)
    if found is None:
        raise ConfigurationError(
            f"BYRD_APP={settings.BYRD_APP} is no Celery app with a Byrd in it that can be imported; the log says more."
        )
    return found


def known_workflows() -> dict[str, Callable[..., Any]] | None:
    """The app's workflows by name; None if they cannot be known."""
    try:
        found = engine()
        found.app.loader.import_default_modules()
        return {name: found.workflow_named(name) for name in found.workflows}
    except Exception:
        logger.exception("The workflows of BYRD_APP=%s cannot be listed", settings.BYRD_APP)
        return None
