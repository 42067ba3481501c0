"""What goes over many items."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task

import byrd

app = Celery("each")
app.conf.update(byrd_lease_seconds=2.0, byrd_sweep_seconds=0.1)
engine = byrd.Byrd(app)
if "MOST_BYTES" in os.environ:
    app.conf.byrd_max_value_bytes = int(os.environ["MOST_BYTES"])
NOTES = Path(os.environ.get("NOTES", "/nonexistent"))


def _note(name: str, text: Any) -> None:
    with (NOTES / name).open("a") as file:
        file.write(f"{text}\n")


@app.task
def count(n: int) -> list[int]:
    """Return 0 to n - 1."""
    return list(range(n))


@app.task
def square(x: int) -> int:
    """x²."""
    return x * x


@app.task
def plus(x: int, y: int = 0, *, z: int = 0) -> int:
    """x + y + z."""
    return x + y + z


@app.task
def same(value: Any) -> Any:
    """The value itself."""
    return value


@app.task
def careful(x: int, bad: list[int]) -> int:
    """x, unless it is a bad one and no file says that all is well."""
    if NOTES.exists():
        _note("tried", x)
    if x in bad and not (NOTES / "well").exists():
        raise ValueError(f"no {x}")
    return x


@app.task
def hold(x: int) -> int:
    """Tell that it has begun; run until a file is there."""
    _note("begun", x)
    while not (NOTES / "go").exists():
        time.sleep(0.02)
    _note("ended", x)
    return x


@app.task
def nap(x: int, seconds: float) -> int:
    """Tell of its beginning and of its end."""
    _note("log", f"+ {x}")
    time.sleep(seconds)
    _note("log", f"- {x}")
    return x


@app.task(bind=True, max_retries=3)
def flaky(self: Task, x: int) -> int:
    """Ask for a retry, once."""
    if self.request.retries == 0:
        raise self.retry(countdown=0.05)
    return x


@app.task(byrd_limit=byrd.Limit(concurrency=1, key="key", name="each-one"))
def limited(x: int, key: str = "k") -> int:
    """x, one at a time."""
    return x


@app.task(base=byrd.CheckpointTask, bind=True)
def remembering(self: byrd.CheckpointTask, x: int) -> Any:
    """x + 1, by way of a sub-step."""
    return self.step("more", lambda: x + 1)


@app.task(base=byrd.CheckpointTask, bind=True)
def doze(self: byrd.CheckpointTask, x: int) -> int:
    """Sleep for long; 0 fails instead, once another one sleeps."""
    if x == 0:
        while not (NOTES / "asleep").exists():
            time.sleep(0.02)
        raise ValueError("no 0")
    self.sleep("nap", 3600)
    return x


@app.task(base=byrd.SagaTask)
def book(x: int) -> int:
    """Book something."""
    _note("booked", x)
    return x


@book.compensation
def unbook(booked: int, x: int) -> None:
    """Note it."""
    _note("unbooked", booked)


@app.task(base=byrd.SagaTask, pivot=True, compensation=None)
def pay(x: int) -> int:
    """Nothing is rolled back after this."""
    return x


@app.task(bind=True)
def replaces_itself(self: Task, x: int) -> Any:
    """Try to let another task take its place."""
    return self.replace(square.s(x))


@app.task
def pages(first: int, most: int, size: int, cursor: Any = None) -> Any:
    """Enumerate first, first + 1, ... below most, a page at a time."""
    if NOTES.exists():
        _note("pages", cursor)
    start = first if cursor is None else cursor
    items = list(range(start, min(most, start + size)))
    return items, (start + size if start + size < most else None)


@app.task
def large_pages(most: int, size: int, cursor: int = 0) -> Any:
    """Enumerate so many texts of 16 kB, a page at a time."""
    to = min(most, (cursor or 0) + size)
    return [str(n).rjust(16384) for n in range(cursor or 0, to)], (to if to < most else None)


@app.task
def bad_pages(cursor: Any = None) -> Any:
    """No page."""
    return [1, 2, 3]


@app.task(byrd_retry=byrd.Retry(max_attempts=3, first=0.05))
def broken_pages(cursor: Any = None) -> Any:
    """Fail for the second page, unless a file says that all is well."""
    if cursor is None:
        return [1, 2], 1
    _note("asked", cursor)
    if not (NOTES / "well").exists():
        raise ConnectionError("no page today")
    return [3], None


@app.task
def fail(*_: Any) -> None:
    """Raise ValueError."""
    raise ValueError("no")


@engine.workflow("each.inner")
def inner(x: int) -> Any:
    """x² + 1, in a run of its own."""
    return square.s(x) | plus.s(1)
