"""The app of ``byrd chaos --embedded``: nothing but an engine; its servers come from the environment."""

from __future__ import annotations

from celery import Celery

from byrd.engine import Byrd

app = Celery("byrd-chaos", set_as_current=False)
engine = Byrd(app)
