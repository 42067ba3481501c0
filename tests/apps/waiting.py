"""Workflows that wait: for a time, for a signal."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, Task, chain

import byrd

app = Celery("waiting")
app.conf.update(
    # Shorter than in production: tests wait for it.
    byrd_lease_seconds=float(os.environ.get("TEST_LEASE_SECONDS", "3")),
)
engine = byrd.Byrd(app)


@app.task
def echo(value: Any = None) -> Any:
    """The value itself."""
    return value


@app.task
def pair(first: Any, second: Any) -> list[Any]:
    """Both."""
    return [first, second]


@app.task(bind=True)
def ask(self: Task, question: str) -> Any:
    """Let a canvas that waits take the task's place."""
    raise self.replace(chain(byrd.sleep(0.1), byrd.wait_for(question), pair.s(question)))


@app.task(base=byrd.SagaTask)
def reserve(what: str) -> str:
    """Do what can be undone."""
    return what.upper()


@reserve.compensation
def release(reservation: str, what: str) -> str:
    """Undo it."""
    return f"released {reservation}"


@app.task
def told(request: Any, exc: Exception, traceback: Any) -> str:
    """An errback."""
    return f"{type(exc).__name__}: {exc}"


@engine.workflow("waiting.approval")
def approval(number: int, timeout: float | None = None) -> Any:
    """What a person has to approve."""
    return chain(echo.s(number), byrd.wait_for("approval", timeout=timeout), echo.s())
