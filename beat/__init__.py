"""Schedules: a minimal Django project around django-celery-beat whose schedules submit workflows."""

from __future__ import annotations

# The task name that makes a periodic task a schedule: its arguments are the workflow's name and the workflow's own.
# No message of this name is ever sent: `beat.scheduler` submits the run itself.
SUBMIT_TASK = "byrd.submit"
