"""Workflows that wait: for a time, for a signal."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from celery import Celery, Task, chain, group

import byrd

app = Celery("waiting")
app.conf.update(
    # Shorter than in production: tests wait for it.
    byrd_lease_seconds=float(os.environ.get("TEST_LEASE_SECONDS", "3")),
)
engine = byrd.Byrd(app)


class Role(str, Enum):  # noqa: UP042 - its members are formatted by their names, not as their values are
    """Who approves."""

    LEGAL = "Ann of legal"


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


@app.task(bind=True, base=byrd.CheckpointTask)
def negotiate(self: byrd.CheckpointTask, seconds: float, timeout: float | None = None) -> dict[str, Any]:
    """Sleep, then wait for two offers; in which process each part ran is remembered."""
    first = self.step("first", os.getpid)
    self.sleep("think", seconds)
    offers = [
        self.wait_for("offer", of="the buyer", timeout=timeout),
        self.wait_for("offer", timeout=timeout, name="again"),
    ]
    other = self.wait_for("other", timeout=0.2, default="none")
    return {"first": first, "offers": offers, "other": other, "attempt": self.request.byrd.number}


@app.task(bind=True, base=byrd.CheckpointTask)
def wait_in_a_transaction(self: byrd.CheckpointTask) -> None:
    """Do what must not be done."""
    with self.transaction():
        self.sleep("think", 1)


@app.task(bind=True, base=byrd.CheckpointTask)
def sleep_until(self: byrd.CheckpointTask, moment: str) -> str:
    """Sleep until a time of day."""
    self.sleep("late", until=datetime.fromisoformat(moment))
    return datetime.now(UTC).isoformat()


@engine.workflow("waiting.approval")
def approval(number: int, timeout: float | None = None) -> Any:
    """What a person has to approve."""
    return chain(echo.s(number), byrd.wait_for("approval", timeout=timeout), echo.s())


@engine.workflow("waiting.purchase")
def purchase(number: int) -> Any:
    """What two people have to approve."""
    both = [byrd.wait_for("approval:finance", of="finance"), byrd.wait_for("approval:legal", of=Role.LEGAL)]
    return chain(echo.s(number), group(both), echo.s())
