"""Checkpoint tasks and sagas that tell the test, through the database and files, what they did."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import Celery, Task
from sqlalchemy import Connection, text

import byrd

app = Celery("progress")
engine = byrd.Byrd(app)
NOTES = Path(os.environ.get("NOTES", "/nonexistent"))


def note(name: str, fact: Any) -> None:
    """Append a line of JSON to a file of the test's, whole."""
    with (NOTES / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(fact) + "\n")


def numbers(count: int, cursor: int | None) -> Iterator[tuple[int, int]]:
    """The numbers after the cursor."""
    for n in range(0 if cursor is None else cursor + 1, count):
        yield n, n


@app.task(bind=True, base=byrd.CheckpointTask)
def count_up(self: byrd.CheckpointTask, name: str, count: int, seconds: float = 0.0, **options: Any) -> dict[str, Any]:
    """Process the numbers below ``count``; each is noted, and written to a table with its checkpoint."""
    options.setdefault("batch_size", 10)

    def process(n: int) -> int:
        note(name, n)
        time.sleep(seconds)
        return n * n

    def save(conn: Connection, outcomes: list[byrd.Outcome]) -> None:
        conn.execute(
            text("INSERT INTO squares (name, n, square) VALUES (:name, :n, :square)"),
            [{"name": name, "n": o.item, "square": o.value} for o in outcomes],
        )

    done = self.iterate(lambda cursor: numbers(count, cursor), process, save=save, **options)
    return {"cursor": done.cursor, "completed": done.completed, "failed": done.failed, "done": done.done}


@app.task(bind=True, base=byrd.CheckpointTask)
def picky(self: byrd.CheckpointTask, name: str, count: int, bad: list[int], heal_after: int = 99) -> dict[str, Any]:
    """Some items fail: for good, or a number of times."""

    def process(n: int) -> int:
        note(name, n)
        tries = sum(json.loads(line) == n for line in (NOTES / name).read_text().splitlines())
        if n in bad and tries <= heal_after:
            raise ValueError(f"item {n} is bad")
        return n

    done = self.iterate(
        lambda cursor: numbers(count, cursor),
        process,
        batch_size=4,
        parallelism=2,
        item_retries=2,
        item_retry_delay=0.05,
    )
    given_up = [[item, error] for item, error in self.quarantined()]
    return {"completed": done.completed, "failed": done.failed, "quarantined": given_up}


@app.task(bind=True, base=byrd.CheckpointTask)
def parallel(self: byrd.CheckpointTask, count: int, width: int) -> dict[str, Any]:
    """Return the most that ran at once, and the intervals between batches."""
    running: list[int] = []
    most: list[int] = []
    starts: list[float] = []

    def process(n: int) -> str:
        running.append(n)
        most.append(len(running))
        if n % 4 == 0:
            starts.append(time.monotonic())
        time.sleep(0.05)
        running.remove(n)
        return str(self.request.id)

    ids: set[str] = set()
    self.iterate(
        lambda cursor: numbers(count, cursor),
        process,
        batch_size=4,
        parallelism=width,
        min_interval=0.3,
        save=lambda conn, outcomes: ids.update(o.value for o in outcomes),
    )
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    return {"most": max(most), "shortest": min(gaps), "ids": sorted(ids)}


@app.task(bind=True, base=byrd.CheckpointTask)
def hanging(self: byrd.CheckpointTask) -> dict[str, Any]:
    """One item of each batch takes too long."""

    def process(n: int) -> int:
        time.sleep(5 if n == 1 else 0)
        return n

    done = self.iterate(
        lambda cursor: numbers(6, cursor), process, batch_size=3, parallelism=3, timeout=0.3, item_retries=0
    )
    return {"completed": done.completed, "failed": done.failed, "error": self.quarantined()[0][1]}


@app.task(bind=True, base=byrd.CheckpointTask, max_retries=5)
def memo(self: byrd.CheckpointTask, name: str, failures: int) -> list[Any]:
    """Two sub-steps, and failures after them."""
    one = self.step("one", _noted, name, "one")
    two = self.step("two", _noted, name, "two")
    if self.request.retries < failures:
        raise self.retry(countdown=0)
    return [one, two]


def _noted(name: str, fact: str) -> dict[str, str]:
    note(name, fact)
    return {"value": fact}


@app.task(bind=True, base=byrd.CheckpointTask, max_retries=9)
def by_hand(self: byrd.CheckpointTask, name: str, count: int, fail_at: int) -> dict[str, Any]:
    """Its own loop, its own transactions; fails once in the middle of one, after it has written."""
    before = self.progress()
    start = before.cursor + 1 if before else 0
    for n in range(start, count):
        with self.transaction() as conn:
            conn.execute(text("INSERT INTO squares (name, n, square) VALUES (:name, :n, 0)"), {"name": name, "n": n})
            self.checkpoint(cursor=n, completed=n + 1)
            if n == fail_at and self.request.retries == 0:
                raise self.retry(countdown=0)
    last = self.progress()
    assert last is not None
    return {"started_at": start, "completed": last.completed}


@app.task(bind=True, base=byrd.CheckpointTask)
def nested(self: byrd.CheckpointTask, name: str) -> Any:
    """A memoised step, and a checkpoint, in an open transaction."""
    with self.transaction() as conn:
        conn.execute(text("INSERT INTO squares (name, n, square) VALUES (:name, 1, 1)"), {"name": name})
        value = self.step("inside", _noted, name, "inside")
        self.checkpoint(cursor=1)

    def save(conn: Connection, outcomes: list[byrd.Outcome]) -> None:
        self.step("saving", _noted, name, "saving")

    self.iterate(lambda cursor: numbers(3, cursor), lambda n: n, save=save)
    return value


@app.task(bind=True, base=byrd.CheckpointTask)
def holding(self: byrd.CheckpointTask, name: str, seconds: float) -> None:
    """Keep a transaction open for longer than the time limit."""
    with self.transaction() as conn:
        conn.execute(text("INSERT INTO squares (name, n, square) VALUES (:name, 1, 1)"), {"name": name})
        self.checkpoint(cursor=1)
        note(name, "open")
        time.sleep(seconds)


@app.task(bind=True, base=byrd.CheckpointTask)
def surrogates(self: byrd.CheckpointTask) -> Any:
    """An item whose error has what UTF-8 has not."""

    def process(n: int) -> None:
        raise ValueError("bad name: \udcff\0")

    done = self.iterate(lambda cursor: numbers(1, cursor), process, item_retries=0)
    return done.failed


@app.task(base=byrd.SagaTask)
def reserve(name: str, what: str) -> dict[str, str]:
    """Reserve something."""
    note(name, ["reserve", what])
    return {"reservation": what.upper()}


@reserve.compensation
def release(result: dict[str, str], name: str, what: str) -> str:
    """Undo it."""
    note(name, ["release", what, result["reservation"]])
    return f"released {what}"


@app.task(base=byrd.SagaTask)
def charge(before: Any, name: str, amount: int) -> int:
    """Charge something, after another step."""
    note(name, ["charge", amount])
    return amount


@charge.compensation(max_retries=3, retry_backoff=False, default_retry_delay=0.05)
def refund(result: int, before: Any, name: str, amount: int) -> None:
    """Undo it; fails for as long as a file says."""
    note(name, ["refund", amount, result, before])
    if (NOTES / f"{name}.broken").exists():
        raise RuntimeError("the bank is closed")


@app.task
def fail(*_: Any) -> None:
    """Raise ValueError."""
    raise ValueError("no")


@app.task
def until(path: str, value: Any = None) -> Any:
    """Run until the file exists."""
    while not Path(path).exists():
        time.sleep(0.02)
    return value


@app.task(bind=True)
def plain(self: Task, x: int) -> int:
    """Nothing special."""
    return x + 1
