"""The canvas tests' tasks on an app with Byrd."""

from __future__ import annotations

import os

from celery import Celery

import byrd
from tests.apps.canvas import define, writer

app = Celery("byrd")
app.conf.update(task_allow_error_cb_on_chord_header=True)
engine = byrd.Byrd(app)
tasks = define(app, writer(app, os.environ["BYRD_BROKER_URL"]))
