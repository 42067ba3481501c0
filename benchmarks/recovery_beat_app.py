"""The app whose schedules fall due while :mod:`benchmarks.recovery_beat` kills its beats."""

from __future__ import annotations

from typing import Any

from celery import Celery

import byrd

app = Celery("recovery_beat")
engine = byrd.Byrd(app)


@app.task
def echo(value: str) -> str:
    """The value itself."""
    return value


@engine.workflow("recovery.tick")
def tick(label: str) -> Any:
    """One step."""
    return echo.s(label)
