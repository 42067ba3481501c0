"""The canvas tests' tasks on a plain Celery app with results in Redis."""

from __future__ import annotations

import os

from celery import Celery

from tests.apps.canvas import define, writer

app = Celery("plain", broker=os.environ["BYRD_BROKER_URL"], backend=os.environ["BYRD_BROKER_URL"])
app.conf.update(
    task_allow_error_cb_on_chord_header=True,
    task_default_queue="plain",
    # A message that is not acknowledged shows that its task, and what it sends on, is not done.
    task_acks_late=True,
    worker_prefetch_multiplier=1,
)
tasks = define(app, writer(app, os.environ["BYRD_BROKER_URL"]))
