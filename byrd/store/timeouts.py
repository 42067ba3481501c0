"""Steps that take too long: attempts that run, or are silent, for too long, and steps that nobody starts.

``timeout_at`` says when to look at a step; the trigger on ``byrd.steps`` keeps it (:mod:`byrd.store.migrations.rules`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import Connection

from byrd.errors import HeartbeatTimeoutError, StartToCloseTimeoutError
from byrd.policies import names_of, retry_of, timeouts_of
from byrd.store import steps
from byrd.store.flow import error_json
from byrd.store.rows import Wakeup, query

#: So many steps are looked at in one round.
BATCH = 100

#: A worker that was never kept from hearing of signs of life.
ALWAYS = 1e9

_NOW = "clock_timestamp()"
_SECONDS = "* interval '1 second'"
#: Since when the step ``s`` is silent: a time before which nobody could have heard of it does not count.
_SIGN = f"""greatest(s.started_at, {_NOW} - %(well)s {_SECONDS}, (SELECT max(c.updated_at) FROM byrd.checkpoints c
    WHERE c.step_id = s.id AND c.attempt = s.attempt))"""
#: Since when the attempts are made that count.
_TRIED_SINCE = "CASE WHEN s.retries > 0 THEN coalesce(s.tried_since, s.started_at) ELSE s.started_at END"


class Overdue(NamedTuple):
    """An attempt whose time is over, and the process that makes it."""

    step_id: str
    attempt: int
    pid: int


class CeleryLimit(NamedTuple):
    """Celery's hard time limit has ended an attempt: the limit, the error (JSON), and its class's names."""

    seconds: float
    error: str
    names: tuple[str, ...]


def overdue_attempts(conn: Connection, worker_id: str, *, well_seconds: float) -> list[Overdue]:
    """Return the attempts of a worker that take too long; those that have given a sign of life are looked at later.

    ``well_seconds``: for how long this worker could have heard of a sign of life.
    """
    rows = query(
        conn,
        f"""WITH seen AS MATERIALIZED (
              SELECT s.id, s.attempt, s.pid, least(
                       s.started_at + (s.options::json -> 'byrd_timeouts' ->> 'start_to_close')::float8 {_SECONDS},
                       {_SIGN} + (s.options::json -> 'byrd_timeouts' ->> 'heartbeat')::float8 {_SECONDS}) AS due
                FROM byrd.steps s
               WHERE s.timeout_at <= {_NOW} AND s.status = 'running' AND s.worker_id = %(worker)s
               LIMIT {BATCH} FOR NO KEY UPDATE SKIP LOCKED),
            later AS (
              UPDATE byrd.steps s SET timeout_at = seen.due FROM seen
               WHERE s.id = seen.id AND coalesce(seen.due > {_NOW}, true))
            SELECT id, attempt, pid FROM seen WHERE due <= {_NOW}""",
        {"worker": worker_id, "well": well_seconds},
    )
    return [Overdue(*row) for row in rows]


def unstarted(conn: Connection) -> list[str]:
    """Return steps that were to be started by now: :func:`byrd.store.steps.miss_start` is to see to each."""
    # now(): a condition on clock_timestamp(), which differs from row to row, reads all that have a time-out.
    rows = query(
        conn,
        f"""SELECT id FROM byrd.steps WHERE timeout_at <= now() AND status = 'ready' AND wake_at < 'infinity'
            ORDER BY timeout_at LIMIT {BATCH}""",
    )
    return [row.id for row in rows]


def tried_seconds(conn: Connection, step_id: str) -> float:
    """Return for how long a running step has been tried, by attempts that count."""
    found = query(
        conn,
        f"SELECT extract(epoch FROM {_NOW} - {_TRIED_SINCE}) FROM byrd.steps s WHERE s.id = %(id)s",
        {"id": step_id},
    ).scalar()
    return max(0.0, float(found or 0))


def time_out(
    conn: Connection,
    step_id: str,
    attempt: int,
    *,
    celery: CeleryLimit | None = None,
    well_seconds: float = ALWAYS,
    owner: str | None = None,
    pid: int | None = None,
    max_preemptions: int = steps.MAX_PREEMPTIONS,
) -> list[Wakeup]:
    """running → ready or failed for an attempt that takes too long, or that Celery has ended for it.

    Its retry policy says which.  Without one a step that ran for too long has failed, and one that was silent is given
    to another attempt, as often as a step may lose its worker.  Where nothing may be rolled back because of it, it is
    tried again after that too, as one that raises is (:func:`byrd.store.steps.fail`).  Nothing happens when the attempt
    does not own the step any more, or its time is not over.
    """
    row = query(
        conn,
        f"""SELECT s.options, s.retries, s.preemptions, s.worker_id::text,
                   extract(epoch FROM {_NOW} - {_TRIED_SINCE})::float8 AS tried,
                   extract(epoch FROM {_NOW} - s.started_at)::float8 AS ran,
                   extract(epoch FROM {_NOW} - {_SIGN})::float8 AS silent
              FROM byrd.steps s WHERE s.id = %(id)s AND s.attempt = %(attempt)s AND s.status = 'running'""",
        {"id": step_id, "attempt": attempt, "well": well_seconds},
    ).first()
    if row is None or (found := _why(row, attempt, celery)) is None:
        return []
    error, names, silent = found
    options = json.loads(row.options)
    policy = retry_of(options)
    worn_out = row.preemptions >= max_preemptions
    if policy is None and silent and not (worn_out and steps.pause_of_persistence(conn, step_id) is not None):
        reason = str(json.loads(error)["exc_message"][0])
        return steps.preempt(
            conn, row.worker_id, step=(step_id, attempt), pid=pid, reason=reason, error=error,
            max_preemptions=max_preemptions,
        )  # fmt: skip
    pause = policy.pause(names, row.retries + 1, elapsed=row.tried) if policy is not None else None
    if pause is None:
        return steps.fail(conn, step_id, attempt, error, owner=owner, pid=pid)
    return steps.retry(conn, step_id, attempt, error, delay=pause, owner=owner, pid=pid)


def _why(row: Any, attempt: int, celery: CeleryLimit | None) -> tuple[str, Iterable[str], bool] | None:
    """Return the error (JSON), its class's names, and whether the attempt was silent; None when it may go on."""
    timeouts = timeouts_of(json.loads(row.options))
    most = timeouts.start_to_close if timeouts is not None else None
    if most is not None and (celery.seconds == most if celery is not None else row.ran >= most):
        return _error(StartToCloseTimeoutError, f"attempt {attempt} ran for longer than {most:g} s"), _LATE, False
    if celery is not None:
        return celery.error, celery.names, False
    if timeouts is not None and timeouts.heartbeat is not None and row.silent >= timeouts.heartbeat:
        text = f"attempt {attempt} gave no sign of life for {timeouts.heartbeat:g} s"
        return _error(HeartbeatTimeoutError, text), _SILENT, True
    return None


_LATE, _SILENT = names_of(StartToCloseTimeoutError), names_of(HeartbeatTimeoutError)


def _error(kind: type[Exception], text: str) -> str:
    return error_json(kind.__name__, kind.__module__, [text])
