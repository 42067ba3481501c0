"""Steps that write through a transaction of their own on Byrd's database, into the table ``effects`` of the test's."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery
from sqlalchemy import Connection, text

import byrd

app = Celery("transactions")
app.conf.update(byrd_lease_seconds=float(os.environ.get("TEST_LEASE_SECONDS", "3")))
engine = byrd.Byrd(app)


@app.task
def echo(value: int) -> int:
    """The value itself."""
    return value


@app.task(base=byrd.CheckpointTask, bind=True)
def write_and_wait(self: byrd.CheckpointTask, key: int, go: str) -> int:
    """Write a row; commit it when the file exists."""
    with self.transaction() as conn:
        conn.execute(text("INSERT INTO effects (key) VALUES (:key)"), {"key": key})
        while not Path(go).exists():
            time.sleep(0.02)
    return key


@app.task(base=byrd.CheckpointTask, bind=True)
def too_slow(self: byrd.CheckpointTask, how: str) -> None:
    """Ask the database for more than it has time for, in a transaction of either kind."""

    def save(conn: Connection, _outcomes: list[byrd.Outcome]) -> None:
        conn.execute(text("SELECT pg_sleep(10)"))

    if how == "save":
        self.iterate(lambda _cursor: [(1, 1)], lambda item: item, save=save)
    with self.transaction() as conn:
        conn.execute(text("SELECT pg_sleep(10)"))


@app.task(base=byrd.CheckpointTask, bind=True)
def add_up(self: byrd.CheckpointTask, key: int) -> int:
    """Read a row, then write what was read plus one: of two at once, a serializable database refuses one."""
    with self.transaction() as conn:
        found = conn.execute(text("SELECT value FROM effects WHERE key = :key"), {"key": key}).scalar_one()
        time.sleep(0.05)
        conn.execute(text("UPDATE effects SET value = :value WHERE key = :key"), {"key": key, "value": found + 1})
    return int(found)
