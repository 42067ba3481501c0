"""A plain Celery app with a handful of tasks, and the one line that makes it durable.

Its database and broker are BYRD_DATABASE_URL and BYRD_BROKER_URL.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task

import byrd

app = Celery("basic")
app.conf.update(
    task_allow_error_cb_on_chord_header=True,
    # Shorter than in production: tests wait for it.
    byrd_lease_seconds=float(os.environ.get("TEST_LEASE_SECONDS", "3")),
)
engine = byrd.Byrd(app)


@app.task
def add(x: Any, y: Any) -> Any:
    """x + y."""
    return x + y


@app.task
def total(values: list[Any]) -> Any:
    """The sum of a list."""
    return sum(values)


@app.task
def linger(value: Any) -> Any:
    """Take long enough for others to interfere."""
    time.sleep(0.03)
    return value


@app.task
def echo(value: Any = None) -> Any:
    """The value itself."""
    return value


@app.task
def fail(message: str = "boom", *_: Any) -> None:
    """Raise ValueError."""
    raise ValueError(message)


@app.task
def note(path: str, text: str) -> str:
    """Append a line to a file, for a test to see that the task ran."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")
    return text


@app.task
def wait_for_file(path: str, value: Any = None) -> Any:
    """Run until the file exists: a step that ends when the test says so."""
    while not Path(path).exists():
        time.sleep(0.02)
    return value


@app.task(bind=True, max_retries=5)
def flaky(self: Task, failures: int, value: Any = None) -> Any:
    """Fail with a retry this many times, then return the value."""
    if self.request.retries < failures:
        raise self.retry(countdown=0.01)
    return value
