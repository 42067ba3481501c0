"""What the store's statements return: frozen rows, as the tables hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Self

import psycopg2
from sqlalchemy import Connection, CursorResult
from sqlalchemy.exc import DBAPIError

#: The Postgres notification channel on which the relay hears of work submitted in a caller's transaction.
CHANNEL = "byrd"


def query(conn: Connection, sql: str, params: Mapping[str, Any] | None = None) -> CursorResult[*tuple[Any, ...]]:
    """Run ``sql`` with ``%(name)s`` parameters, bound by the driver."""
    return conn.exec_driver_sql(sql, dict(params or {}))


def rows_of(conn: Connection, sql: str, params: Mapping[str, Any]) -> Sequence[Any]:
    """Run ``sql`` as :func:`query` does, on a connection of Byrd's own, and return its rows.

    For what is run most: SQLAlchemy takes a quarter of a millisecond of this process to run a statement and to describe
    its rows, the driver alone a tenth of that.  Who listens to SQLAlchemy's events (tracing, :mod:`byrd.testing`) is
    told of each statement nevertheless: then it is SQLAlchemy that runs it.
    """
    told = conn.engine.dispatch
    if told.before_cursor_execute or told.after_cursor_execute:
        return query(conn, sql, params).all()
    raw: Any = conn.connection.dbapi_connection
    try:
        with raw.cursor() as cursor:
            cursor.execute(sql, params)
            rows: list[Any] = cursor.fetchall()
            return rows
    except psycopg2.Error as exc:
        lost = conn.dialect.is_disconnect(exc, raw, None)
        if lost:
            conn.invalidate(exc)
            conn.engine.dispose()  # the others were lost, too
        raise DBAPIError.instance(
            sql, params, exc, psycopg2.Error, connection_invalidated=lost, dialect=conn.dialect
        ) from exc
    except Exception:
        raise  # a value that cannot be sent: nothing was
    except BaseException:
        conn.invalidate()  # stopped in the middle of it
        raise


def array_of(values: Iterable[Any]) -> str:
    """Return values as Postgres writes an array.

    psycopg2 would adapt each of them by itself, and Postgres parse each as an expression.
    """
    return "{" + ",".join([_element(value) for value in values]) + "}"


def _element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"') if "\\" in value or '"' in value else value
        return f'"{escaped}"'
    if isinstance(value, datetime):
        return f'"{value.isoformat()}"'
    return str(value)


class Wakeup(NamedTuple):
    """A ready step as the relay publishes it."""

    id: str
    run_id: str
    no: int
    kind: str
    task: str
    queue: str
    attempt: int
    retries: int
    options: str
    group_id: str | None
    join_pos: int | None
    parent_id: str | None
    due: bool
    #: It is run by its own message only; otherwise by whoever is awake.
    solo: bool = True
    #: Its task has a limit, and it has neither a place nor a ticket yet: it is to line up first.
    limited: bool = False


#: The columns of :class:`Wakeup` for a RETURNING clause, of the table alias ``s``.
WAKEUP = """s.id, s.run_id, s.no, s.kind, s.task, s.queue, s.attempt, s.retries, s.options, s.group_id, s.join_pos,
    (SELECT p.id FROM byrd.steps p WHERE p.run_id = s.run_id AND p.no = s.after) AS parent_id,
    s.run_at <= clock_timestamp() AS due, s.solo,
    s.limit_key IS NOT NULL AND s.limit_no IS NULL AND s.limit_slot IS NULL AS limited"""


#: How a step is let go of: for the SET of an UPDATE.
UNCLAIMED = "worker_id = NULL, pid = NULL, claim = NULL, limit_slot = NULL, limit_no = NULL"


def wakeups_of(rows: Iterable[Any]) -> list[Wakeup]:
    """Read rows whose first columns are :data:`WAKEUP`."""
    return [Wakeup(row[0], str(row[1]), *row[2 : len(Wakeup._fields)]) for row in rows]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claimed step: what an attempt needs to know to run it."""

    id: str
    run_id: str
    no: int
    kind: str
    task: str
    attempt: int
    retries: int
    preemptions: int
    args: str
    kwargs: str
    options: str
    group_id: str | None
    join_no: int | None
    join_pos: int | None
    parent_id: str | None
    parent_task: str | None
    on_failure: bool
    input_no: int | None
    input: str | None
    after_error: str | None
    compensates: int | None
    queue: str | None = None


class Consumers(NamedTuple):
    """Who consumes a queue: how many processes of how many workers, and whether all take steps without a message."""

    processes: int
    all_share: bool
    workers: int


class Counts(NamedTuple):
    """The progress of one checkpoint."""

    cursor: str | None
    completed: int
    failed: int
    done: bool


@dataclass(frozen=True, slots=True)
class RunRow:
    """One row of ``byrd.runs``."""

    id: str
    workflow: str | None
    title: str
    key: str | None
    status: str
    output: int
    outcome: str | None
    error: str | None
    created_at: datetime
    finished_at: datetime | None
    deadline: datetime | None
    compensate: bool
    terminate_at: datetime | None
    pivot: int | None
    parent_step: str | None = None

    @classmethod
    def columns(cls) -> str:
        """Return the column list for a SELECT from ``byrd.runs r``."""
        return ", ".join(f"r.{name}" for name in cls.__dataclass_fields__)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Build it from a row's mapping."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class StepRow:
    """One row of ``byrd.steps``, without its arguments."""

    id: str
    run_id: str
    no: int
    kind: str
    task: str | None
    queue: str | None
    status: str
    after: int | None
    on_failure: bool
    join_no: int | None
    join_pos: int | None
    compensates: int | None
    saga: int | None
    mark: str | None
    rank: int | None
    waiting: int
    replaced: bool
    signal: str | None
    signal_of: str | None
    attempt: int
    retries: int
    preemptions: int
    sends: int
    run_at: datetime | None
    wake_at: datetime | None
    ready_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    worker_id: str | None
    pid: int | None
    result: str | None
    error: str | None
    cause: int | None

    @classmethod
    def columns(cls) -> str:
        """Return the column list for a SELECT from ``byrd.steps s``."""
        return ", ".join(f"s.{name}" for name in cls.__dataclass_fields__)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Build it from a row's mapping."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One row of ``byrd.workers``; ``alive`` while its lease lasts."""

    id: str
    hostname: str
    pid: int
    pool: str
    concurrency: int
    queues: list[str]
    tasks: list[str]
    shares: list[str]
    version: str
    started_at: datetime
    heartbeat_at: datetime
    lease_until: datetime
    stopping: bool
    alive: bool
    running: int
