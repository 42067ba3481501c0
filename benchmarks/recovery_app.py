"""The app whose steps the faults of ``recovery_servers`` and ``recovery_workers`` strike."""

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


@app.task(bind=True, base=byrd.CheckpointTask)
def hold_in_steps(self: byrd.CheckpointTask, go: str) -> int:
    """Run until a file exists, with a checkpoint every tenth of a second."""
    done = 0
    while not Path(go).exists():
        time.sleep(0.1)
        done += 1
        self.checkpoint(cursor=done, completed=done)
    return 0


@app.task
def add_one(value: int) -> int:
    """value + 1."""
    return value + 1
