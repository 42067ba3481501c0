"""The canvas tests' tasks on an eager Celery app: no worker, no broker."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from celery import Celery

from tests.apps.canvas import define

app = Celery("eager", broker="memory://", backend="cache+memory://")
app.conf.update(task_allow_error_cb_on_chord_header=True, task_always_eager=True)
#: What the callbacks and errbacks of each canvas were called with.
log: dict[str, list[list[Any]]] = defaultdict(list)
tasks = define(app, lambda key, entry: log[key].append(entry))
