"""An app under Celery's least lucky delivery settings, all from the environment: late acks, prefetch, time-outs.

Its database and broker are BYRD_DATABASE_URL and BYRD_BROKER_URL.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task

import byrd

app = Celery("delivery")
app.conf.update(
    byrd_lease_seconds=float(os.environ.get("TEST_LEASE_SECONDS", "3")),
    task_acks_late=os.environ.get("TEST_ACKS", "late") == "late",
    task_reject_on_worker_lost=True,
    worker_cancel_long_running_tasks_on_connection_loss=os.environ.get("TEST_CANCEL", "") == "1",
    broker_transport_options={"visibility_timeout": float(os.environ.get("TEST_VISIBILITY_SECONDS", "2"))},
)
if os.environ.get("TEST_RESULTS"):
    app.conf.update(result_backend=os.environ["TEST_RESULTS"], result_backend_transport_options={"retry_policy": {}})
if os.environ.get("TEST_PREFETCH"):
    app.conf.update(worker_disable_prefetch=False, worker_prefetch_multiplier=int(os.environ["TEST_PREFETCH"]))
engine = byrd.Byrd(app)


@app.task
def note(path: str, text: Any, seconds: float = 0.0) -> Any:
    """Append a line to a file when it begins, then take its time."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")
    time.sleep(seconds)
    return text


@app.task
def anything(*args: Any, path: str = "", **kwargs: Any) -> str:
    """Take whatever it is given, and append it to a file."""
    with Path(path or os.environ["TEST_NOTES"]).open("a", encoding="utf-8") as file:
        file.write(f"{args} {kwargs}\n")
    return "done"


@app.task
def add(x: Any, y: Any = 1) -> Any:
    """x + y."""
    return x + y


@app.task
def wait_for_file(path: str, value: Any = None) -> Any:
    """Run until the file exists."""
    while not Path(path).exists():
        time.sleep(0.02)
    return value


@app.task(bind=True)
def second_time(self: Task, path: str, value: Any) -> Any:
    """Ask for a retry; then run until the file exists."""
    if not self.request.retries:
        raise self.retry(countdown=1.0)
    while not Path(path).exists():
        time.sleep(0.02)
    return value


@app.task
def gather(values: list[Any]) -> list[Any]:
    """The list itself."""
    return values


@app.task
def where() -> str:
    """The file of the Byrd that runs this."""
    return str(byrd.__file__)
