"""The app whose steps the faults of :mod:`benchmarks.recovery_servers` strike."""

from __future__ import annotations

import time
from pathlib import Path

from celery import Celery

import byrd

app = Celery("recovery")
engine = byrd.Byrd(app)


@app.task
def hold(go: str) -> int:
    """Run until a file exists."""
    while not Path(go).exists():
        time.sleep(0.01)
    return 0


@app.task
def add_one(value: int) -> int:
    """value + 1."""
    return value + 1
