"""Tasks with retry policies and time-outs.  Each call leaves a line in a file of the folder ``NOTES``."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from celery import Celery, Task

import byrd

app = Celery("policies")
app.conf.update(byrd_lease_seconds=float(os.environ.get("TEST_LEASE_SECONDS", "3")), worker_prefetch_multiplier=1)
engine = byrd.Byrd(app)
NOTES = Path(os.environ.get("NOTES", "/nonexistent"))
SOON = byrd.Retry(max_attempts=4, first=0.05, factor=1, jitter=False, never=(KeyError, "tests.apps.policies.Fatal"))


class Fatal(Exception):
    """Nothing makes it better."""


class Deadly(Fatal):
    """A subclass of that."""


class Busy(Exception):
    """Carries its own delay, as the errors of many libraries."""

    def __init__(self, retry_after: Any) -> None:
        super().__init__("busy")
        self.retry_after = retry_after


def note(name: str, **facts: Any) -> None:
    """Append a line of JSON to a file of the test's."""
    if NOTES.exists():
        with (NOTES / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), "pid": os.getpid(), **facts}) + "\n")


ERRORS: dict[str, Any] = {
    "value": lambda: ValueError("no"),
    "key": lambda: KeyError("no"),
    "fatal": lambda: Deadly("no"),
    "later": lambda: byrd.RetryLater(0.7),
    "busy": lambda: Busy(timedelta(seconds=0.7)),
    "soon": lambda: Busy(0),
    "nonsense": lambda: Busy("tomorrow"),
}


def _tried(self: Task, failures: int, error: str) -> list[int]:
    number = self.request.byrd.number
    note("tried", number=number, retries=self.request.retries)
    if number <= failures:
        exc: Exception = ERRORS[error]()
        raise exc
    return [number, self.request.retries]


@app.task(bind=True, byrd_retry=SOON)
def policed(self: Task, failures: int, error: str = "value") -> list[int]:
    """Fail so often, under the task's own policy."""
    return _tried(self, failures, error)


@app.task(bind=True)
def plain(self: Task, failures: int, error: str = "value") -> list[int]:
    """The same without one."""
    return _tried(self, failures, error)


@app.task(bind=True, byrd_retry=SOON, autoretry_for=(ValueError,), max_retries=1, default_retry_delay=0)
def both(self: Task, failures: int, error: str = "value") -> list[int]:
    """Celery's own retries for some errors, the policy for the others."""
    return _tried(self, failures, error)


@app.task(bind=True, byrd_retry=SOON, max_retries=1)
def by_hand(self: Task, failures: int) -> list[int]:
    """Retry by oneself."""
    number = self.request.byrd.number
    if number <= failures:
        raise self.retry(exc=ValueError("by hand"), countdown=0)
    return [number, self.request.retries]


@app.task(byrd_retry=SOON)
def unjsonable() -> Any:
    """Return what JSON cannot hold: no attempt makes that better."""
    note("unjsonable")
    return object()


@app.task(bind=True)
def replacing(self: Task) -> Any:
    """Let a step without a policy of its own take its place."""
    raise self.replace(plain.s(1))


@app.task
def echo(value: Any = None, *_: Any) -> Any:
    """Return the value."""
    return value


# -- time-outs -------------------------------------------------------------------------------------


def _sleep(self: Task, name: str, seconds: float, attempts: int) -> int:
    number: int = self.request.byrd.number
    note(name, number=number)
    if number <= attempts:
        time.sleep(seconds)
    note(f"{name}.done", number=number)
    return number


@app.task(bind=True, byrd_timeouts=byrd.Timeouts(start_to_close=1))
def limited(self: Task, name: str, seconds: float = 60, attempts: int = 99) -> int:
    """Take too long, in so many attempts."""
    return _sleep(self, name, seconds, attempts)


@app.task(bind=True, byrd_timeouts=byrd.Timeouts(start_to_close=1), byrd_retry=SOON)
def limited_and_retried(self: Task, name: str, seconds: float = 60, attempts: int = 1) -> int:
    """The same, tried again."""
    return _sleep(self, name, seconds, attempts)


@app.task(bind=True, time_limit=1, byrd_retry=SOON)
def celery_limited(self: Task, name: str, attempts: int = 1) -> int:
    """A time limit of Celery's, tried again."""
    return _sleep(self, name, 60, attempts)


@app.task(bind=True)
def slow(self: Task, name: str, seconds: float = 60, attempts: int = 99) -> int:
    """Take time."""
    return _sleep(self, name, seconds, attempts)


@app.task(bind=True, base=byrd.CheckpointTask, byrd_timeouts=byrd.Timeouts(heartbeat=1.5))
def counting(self: byrd.CheckpointTask, name: str, most: int = 10, hang_at: int = -1, attempts: int = 1) -> list[Any]:
    """Process items of 0.3 s each, a checkpoint after each; hang at one of them, in so many attempts."""
    number = self.request.byrd.number
    note(name, number=number)

    def process(item: int) -> None:
        note(f"{name}.items", item=item, number=number)
        time.sleep(60 if item == hang_at and number <= attempts else 0.3)

    def items(cursor: int | None) -> Any:
        return ((n, n) for n in range(0 if cursor is None else cursor + 1, most))

    done = self.iterate(items, process, batch_size=1)
    return [done.completed, number]


@app.task(bind=True, byrd_timeouts=byrd.Timeouts(heartbeat=1.5))
def beating(self: Task, seconds: float) -> int:
    """Take time, and say so."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        self.heartbeat()
        time.sleep(0.05)
    return getattr(self.request.get("byrd"), "number", 0)


@app.task(bind=True, base=byrd.CheckpointTask, byrd_timeouts=byrd.Timeouts(heartbeat=1.5))
def patient(self: byrd.CheckpointTask) -> int:
    """Wait between two batches for longer than the heartbeat allows to be silent."""
    self.iterate(lambda cursor: ((n, n) for n in range(cursor or 0, 2)), lambda _: None, batch_size=1, min_interval=4)
    number: int = self.request.byrd.number
    return number


# -- sagas -----------------------------------------------------------------------------------------


@app.task(base=byrd.SagaTask)
def book(room: str) -> str:
    """Can be undone."""
    return f"booked {room}"


@book.compensation(bind=True, byrd_retry=byrd.Retry(max_attempts=3, first=0.05, factor=1))
def unbook(self: Task, _booking: str, room: str) -> str:
    """Undo, at the third attempt."""
    number = self.request.byrd.number
    note("unbook", number=number)
    if number < 3 or room == "stuck":
        raise ValueError("no")
    return room


@app.task
def refuse(_: Any) -> None:
    """Fail for good."""
    raise ValueError("refused")
