"""What somebody outside is to be told, at least once: that a rollback is stuck.

A notice is written with the transition that it tells of.  Whoever delivers it says so afterwards; one that died, or
failed, in between leaves it to be delivered again.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from byrd.store.rows import query

_NOW = "clock_timestamp()"
#: After so long a notice is delivered again unless it was said that it is; then later and later.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 15.0, 600.0


class Notice(NamedTuple):
    """A rollback that is stuck: in which run, at which compensation, of which step, and since when; who was told."""

    id: int
    run_id: str
    workflow: str | None
    title: str
    status: str
    step_no: int
    task: str
    undoes: int | None
    error: str | None
    at: datetime
    told: list[str]


def take(conn: Connection, *, limit: int = 20) -> list[Notice]:
    """Return notices that are due, and are not due again for a while."""
    rows = query(
        conn,
        f"""WITH due AS MATERIALIZED (
              SELECT id FROM byrd.notices WHERE delivered_at IS NULL AND due_at <= now()
               ORDER BY due_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED),
            taken AS (
              UPDATE byrd.notices n SET tries = n.tries + 1, due_at = {_NOW} + interval '1 second'
                       * least({_LONGEST_PAUSE_SECONDS}, {_FIRST_PAUSE_SECONDS} * power(2, least(n.tries, 10)))
                FROM due WHERE n.id = due.id RETURNING n.id, n.run_id, n.step_no, n.at, n.told)
            SELECT t.id, t.run_id::text, r.workflow, r.title, r.status, t.step_no, s.task, s.compensates, s.error, t.at,
                   t.told
              FROM taken t JOIN byrd.runs r ON r.id = t.run_id
              JOIN byrd.steps s ON s.run_id = t.run_id AND s.no = t.step_no ORDER BY t.id""",
        {"limit": limit},
    )
    return [Notice._make(row) for row in rows]


def told(conn: Connection, notice_id: int, whom: str) -> None:
    """Record that somebody was told, of all that are to be."""
    query(
        conn,
        "UPDATE byrd.notices SET told = array_append(told, %(whom)s) WHERE id = %(id)s AND %(whom)s <> ALL(told)",
        {"id": notice_id, "whom": whom},
    )


def delivered(conn: Connection, notice_id: int) -> None:
    """Record that a notice was delivered."""
    query(
        conn,
        f"UPDATE byrd.notices SET delivered_at = {_NOW}, error = NULL WHERE id = %(id)s AND delivered_at IS NULL",
        {"id": notice_id},
    )


def failed(conn: Connection, notice_id: int, error: str) -> None:
    """Record why a notice could not be delivered: it is due again later."""
    query(
        conn,
        "UPDATE byrd.notices SET error = %(error)s WHERE id = %(id)s AND delivered_at IS NULL",
        {"id": notice_id, "error": error},
    )


def undelivered(conn: Connection) -> tuple[int, str | None]:
    """Return how many notices were tried and are not delivered yet, and why the last of these is not."""
    row = query(
        conn,
        """SELECT count(*) AS notices, (array_agg(error ORDER BY id DESC))[1] AS error FROM byrd.notices
            WHERE delivered_at IS NULL AND error IS NOT NULL""",
    ).one()
    return int(row.notices), row.error
