"""What a worker imports to take part: it gives the tasks of the load to each app in the process that has an engine.

::

    celery -A shop worker -I byrd.chaos.load -Q celery,byrd-chaos
"""

from __future__ import annotations

from celery import Celery
from celery._state import _get_active_apps, connect_on_app_finalize

from byrd.chaos.tasks import register


def _register_if_adopted(app: Celery) -> None:
    if getattr(app, "byrd", None) is not None:
        register(app)


connect_on_app_finalize(_register_if_adopted)
for _app in list(_get_active_apps()):
    # An app that is finalized already will not call back: a worker imports what -I names late.
    if _app.finalized:
        _register_if_adopted(_app)
