"""Steps that can be undone, and write down when they are done and undone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NoReturn

from celery import Celery

import byrd

app = Celery("clock")
app.conf.update(byrd_lease_seconds=float(os.environ.get("TEST_LEASE_SECONDS", "3")))
engine = byrd.Byrd(app)


def note(path: str, text: str) -> None:
    """Append a line to a file."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


@app.task(base=byrd.SagaTask)
def reserve(path: str, name: str) -> str:
    """Note what is reserved."""
    note(path, f"+{name}")
    return name


@reserve.compensation
def release(result: Any, path: str, name: str) -> None:
    """Note what is given back."""
    note(path, f"-{name}")


@app.task
def echo(value: Any = None) -> Any:
    """The value itself."""
    return value


@app.task
def fail() -> NoReturn:
    """Raise ValueError."""
    raise ValueError("no")


@app.task
def wait_for_file(path: str, value: Any = None) -> Any:
    """Run until the file exists."""
    while not Path(path).exists():
        time.sleep(0.02)
    return value
