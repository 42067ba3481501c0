"""Tasks with limits.  Each call leaves a line in Postgres that says when it started, and how many ran just then."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
from celery import Celery, Task

import byrd

app = Celery("limited")
app.conf.update(
    # Shorter than in production: tests wait for it.
    byrd_lease_seconds=float(os.environ.get("TEST_LEASE_SECONDS", "3")),
    worker_prefetch_multiplier=1,
)
engine = byrd.Byrd(app)

WITNESS = """CREATE TABLE witness (id serial, what text, value text, at timestamptz DEFAULT clock_timestamp(),
                                   at_once int)"""


@contextmanager
def witnessed(what: str, value: Any) -> Iterator[None]:
    """Be on record with the others that run now: the server forgets a process that is killed, as it must."""
    with closing(psycopg2.connect(os.environ["BYRD_DATABASE_URL"])) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute("SELECT pg_advisory_lock_shared(4711, hashtext(%s))", (what,))
        cursor.execute(
            """INSERT INTO witness (what, value, at_once) SELECT %s, %s, count(*) FROM pg_locks
                WHERE locktype = 'advisory' AND classid = 4711 AND objid = hashtext(%s)::oid
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())""",
            (what, str(value), what),
        )
        yield


@app.task(byrd_limit=byrd.Limit("20/s"))
def often(value: int) -> int:
    """At most 20 in a second."""
    with witnessed("often", value):
        return value


@app.task(byrd_limit=byrd.Limit(concurrency=3))
def few(value: int, seconds: float = 0.1) -> int:
    """At most three at once."""
    with witnessed("few", value):
        time.sleep(seconds)
        return value


@app.task(byrd_limit=byrd.Limit(concurrency=1, key="tenant"))
def serve(tenant: str, value: int = 0) -> str:
    """One at a time of each tenant."""
    with witnessed(f"serve {tenant}", value):
        return tenant


@app.task(bind=True, byrd_limit=byrd.Limit(concurrency=1, key=lambda _before, path: path, name="files"))
def hold(self: Task, _before: Any, path: str) -> int:
    """Run until the file is there; one for each file."""
    with witnessed(f"hold {path}", self.request.retries):
        while not Path(path).exists():
            time.sleep(0.02)
        number: int = self.request.byrd.number
        return number


@app.task(byrd_limit=byrd.Limit(concurrency=1, key=lambda path: path, name="files"))
def touch(path: str) -> str:
    """Share the limit of ``hold``."""
    return path


@app.task(bind=True, byrd_limit=byrd.Limit("1000/s", burst=1000, key="host", name="hosts"), max_retries=0)
def fetch(self: Task, host: str, value: int, pause: str = "2") -> list[Any]:
    """Be told by the host, the first time, to come back later."""
    with witnessed(f"fetch {host}", value):
        if host == "busy" and value == 0 and self.request.byrd.number == 1:
            raise byrd.LimitedError("429 Too Many Requests", retry_after=pause)
        return [host, value, self.request.retries]


@app.task(bind=True, byrd_limit=byrd.Limit(concurrency=5, name="tried"), autoretry_for=(Exception,), max_retries=0)
def tried(self: Task) -> list[int]:
    """Be told to come back by a task that Celery retries on any error, though never."""
    if self.request.byrd.number < 3:
        raise byrd.LimitedError(retry_after=0.1)
    return [self.request.byrd.number, self.request.retries]


#: How often each item was asked for, in this process.
_ASKED: Counter[tuple[str, int]] = Counter()


@app.task(bind=True, base=byrd.CheckpointTask, byrd_limit=byrd.Limit(concurrency=1, key="name"))
def crawl(self: byrd.CheckpointTask, name: str, count: int, says: dict[str, list[str]], **options: Any) -> list[Any]:
    """Go over numbers; ``says``: what some of them are answered with before they are to be had."""

    def process(n: int) -> None:
        with witnessed(f"crawl {name}", n):
            _ASKED[name, n] += 1
            answers = says.get(str(n), [])
            if _ASKED[name, n] <= len(answers):
                answer = answers[_ASKED[name, n] - 1]
                raise byrd.LimitedError("429", retry_after=answer) if answer.isdigit() else ValueError(answer)

    def numbers(cursor: int | None) -> Iterator[tuple[int, int]]:
        return ((n, n) for n in range(0 if cursor is None else cursor + 1, count))

    done = self.iterate(numbers, process, item_retries=1, item_retry_delay=0.05, **options)
    return [done.completed, done.failed, self.request.byrd.number, self.request.retries]


@app.task
def free(value: Any) -> Any:
    """No limit, but a line in Postgres."""
    with witnessed("free", value):
        return value


@app.task
def echo(value: Any) -> Any:
    """No limit."""
    return value


@app.task(byrd_limit=byrd.Limit(concurrency=1, key="key", name="strange"))
def strange(key: Any) -> Any:
    """A task that takes what cannot be a key."""
    return key
