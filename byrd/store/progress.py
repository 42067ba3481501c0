"""Checkpoints: the saved progress inside one step.  Every write is fenced by the step's attempt number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from byrd.errors import ControlFlow, StaleAttempt, StepCancelled, StepHandedBack
from byrd.store.rows import Counts, query


@dataclass(frozen=True, slots=True)
class FailedItem:
    """An item that failed: ``cursor`` names it, ``item`` and ``error`` are JSON."""

    cursor: str
    item: str
    tries: int
    error: str
    quarantined: bool
    retry_in: float = 0.0


def load(conn: Connection, step_id: str, name: str) -> Counts | None:
    """Return the last checkpoint of that name, from whichever attempt it is."""
    row = query(
        conn,
        "SELECT cursor, completed, failed, done FROM byrd.checkpoints WHERE step_id = %(id)s AND name = %(name)s",
        {"id": step_id, "name": name},
    ).first()
    return Counts(*row) if row is not None else None


def save(conn: Connection, step_id: str, attempt: int, name: str, counts: Counts) -> None:
    """Record progress."""
    row = query(
        conn,
        f"""INSERT INTO byrd.checkpoints (step_id, name, attempt, cursor, completed, failed, done)
            SELECT %(id)s, %(name)s, %(attempt)s, %(cursor)s, %(completed)s, %(failed)s, %(done)s WHERE {_OWNED}
            ON CONFLICT (step_id, name) DO UPDATE SET attempt = excluded.attempt, cursor = excluded.cursor,
               completed = excluded.completed, failed = excluded.failed, done = excluded.done,
               updated_at = clock_timestamp()
            RETURNING 1""",
        {"id": step_id, "name": name, "attempt": attempt, **counts._asdict()},
    ).first()
    if row is None:
        raise StaleAttempt(f"step {step_id}: attempt {attempt} may not save a checkpoint: another one owns the step")


def save_and_look(conn: Connection, step_id: str, attempt: int, name: str, counts: Counts) -> ControlFlow | None:
    """Record progress, and return what should stop the step at this checkpoint: one statement."""
    row = query(
        conn,
        f"""WITH saved AS (
              INSERT INTO byrd.checkpoints (step_id, name, attempt, cursor, completed, failed, done)
              SELECT %(id)s, %(name)s, %(attempt)s, %(cursor)s, %(completed)s, %(failed)s, %(done)s WHERE {_OWNED}
              ON CONFLICT (step_id, name) DO UPDATE SET attempt = excluded.attempt, cursor = excluded.cursor,
                 completed = excluded.completed, failed = excluded.failed, done = excluded.done,
                 updated_at = clock_timestamp()
              RETURNING step_id)
            SELECT {_REASON} FROM saved JOIN byrd.steps s ON s.id = saved.step_id
              JOIN byrd.runs r ON r.id = s.run_id LEFT JOIN byrd.workers w ON w.id = s.worker_id""",
        {"id": step_id, "name": name, "attempt": attempt, **counts._asdict()},
    ).first()
    if row is None:
        raise StaleAttempt(f"step {step_id}: attempt {attempt} may not save a checkpoint: another one owns the step")
    return _reason(step_id, row)


def beat(conn: Connection, step_id: str, attempt: int) -> ControlFlow | None:
    """Record a sign of life, and return what should stop the step here."""
    return save_and_look(conn, step_id, attempt, BEAT, Counts(None, 0, 0, False))


#: The name of what is no checkpoint, but a sign of life.
BEAT = "beat:"
#: FOR KEY SHARE: the step cannot be given to another attempt between this check and the commit.
_OWNED = """EXISTS (SELECT 1 FROM byrd.steps s WHERE s.id = %(id)s AND s.attempt = %(attempt)s
                    AND s.status = 'running' FOR SHARE)"""
_REASON = """CASE WHEN s.kind = 'compensation' AND r.status = 'cancelling' THEN 'compensating'
      WHEN s.saga IS NOT NULL AND s.kind <> 'compensation' AND NOT EXISTS
        (SELECT 1 FROM byrd.steps g WHERE g.run_id = s.run_id AND g.no = s.saga AND g.status IN ('pending','succeeded'))
      THEN 'cancelling' ELSE r.status END AS status,
    coalesce(w.stopping, false) AS stopping"""


def remembered(conn: Connection, step_id: str, name: str) -> str | None:
    """Return the memoised value (JSON) of a sub-step, or None when it has not completed."""
    return query(
        conn,
        "SELECT value FROM byrd.checkpoints WHERE step_id = %(id)s AND name = %(name)s AND done",
        {"id": step_id, "name": name},
    ).scalar()


def remember(conn: Connection, step_id: str, attempt: int, name: str, value: str) -> None:
    """Memoise the value (JSON) of a sub-step."""
    row = query(
        conn,
        f"""INSERT INTO byrd.checkpoints (step_id, name, attempt, value, done)
            SELECT %(id)s, %(name)s, %(attempt)s, %(value)s, true WHERE {_OWNED}
            ON CONFLICT (step_id, name) DO UPDATE SET value = excluded.value, attempt = excluded.attempt RETURNING 1""",
        {"id": step_id, "name": name, "attempt": attempt, "value": value},
    ).first()
    if row is None:
        raise StaleAttempt(f"step {step_id}: attempt {attempt} may not record {name!r}: another one owns the step")


def conclude(conn: Connection, step_id: str, attempt: int, name: str) -> None:
    """Memoise ``name`` as the last on record; not so if an earlier attempt has gone on since it came to this."""
    row = query(
        conn,
        f"""INSERT INTO byrd.checkpoints AS c (step_id, name, attempt, value, done)
            SELECT %(id)s, %(name)s, %(attempt)s, 'true', true WHERE {_OWNED}
            ON CONFLICT (step_id, name) DO UPDATE SET attempt = excluded.attempt, updated_at = CASE
               WHEN EXISTS (SELECT 1 FROM byrd.checkpoints l WHERE l.step_id = c.step_id AND l.attempt < %(attempt)s
                             AND l.updated_at > c.updated_at AND {_OF_THE_TASK})
               THEN c.updated_at ELSE clock_timestamp() END RETURNING 1""",
        {"id": step_id, "name": name, "attempt": attempt, "beat": BEAT},
    ).first()
    if row is None:
        raise StaleAttempt(f"step {step_id}: attempt {attempt} may not record {name!r}: another one owns the step")


#: The checkpoint ``l`` is none that a block of operations notes of itself, by names with a colon; nor a sign of life.
_OF_THE_TASK = "l.name <> %(beat)s AND NOT l.name ~ '^step:.*: :'"


def outlived(conn: Connection, step_id: str, name: str) -> bool:
    """Tell whether the attempt that memoised this last has failed, or is tried again, with nothing on record since."""
    row = query(
        conn,
        f"""SELECT 1 FROM byrd.checkpoints c JOIN byrd.attempts a ON a.step_id = c.step_id AND a.attempt = c.attempt
            WHERE c.step_id = %(id)s AND c.name = %(name)s AND c.done AND a.outcome IN ('failed','retried')
              AND NOT EXISTS (SELECT 1 FROM byrd.checkpoints l WHERE l.step_id = c.step_id
                    AND l.updated_at > c.updated_at AND {_OF_THE_TASK})""",
        {"id": step_id, "name": name, "beat": BEAT},
    ).first()
    return row is not None


def put_failed(conn: Connection, step_id: str, name: str, items: Iterable[FailedItem]) -> None:
    """Record items that failed; the caller has checked the fence in this transaction."""
    for item in items:
        query(
            conn,
            """INSERT INTO byrd.failed_items (step_id, name, cursor, item, tries, error, quarantined, retry_at)
               VALUES (%(id)s, %(name)s, %(cursor)s, %(item)s, %(tries)s, %(error)s, %(quarantined)s,
                       clock_timestamp() + %(delay)s * interval '1 second')
               ON CONFLICT (step_id, name, cursor) DO UPDATE SET tries = excluded.tries, error = excluded.error,
                  quarantined = excluded.quarantined, retry_at = excluded.retry_at""",
            {
                "id": step_id, "name": name, "cursor": item.cursor, "item": item.item, "tries": item.tries,
                "error": item.error, "quarantined": item.quarantined, "delay": item.retry_in,
            },
        )  # fmt: skip


def drop_failed(conn: Connection, step_id: str, name: str, cursors: Iterable[str]) -> None:
    """Forget items that have succeeded after all."""
    query(
        conn,
        "DELETE FROM byrd.failed_items WHERE step_id = %(id)s AND name = %(name)s AND cursor = ANY(%(cursors)s)",
        {"id": step_id, "name": name, "cursors": list(cursors)},
    )


def to_retry(conn: Connection, step_id: str, name: str, *, limit: int) -> list[tuple[FailedItem, float]]:
    """Return the items to try again, with the seconds until their time."""
    rows = query(
        conn,
        """SELECT cursor, item, tries, error, extract(epoch FROM retry_at - clock_timestamp()) AS wait
           FROM byrd.failed_items WHERE step_id = %(id)s AND name = %(name)s AND NOT quarantined
           ORDER BY retry_at LIMIT %(limit)s""",
        {"id": step_id, "name": name, "limit": limit},
    )
    return [(FailedItem(r.cursor, r.item, r.tries, r.error, False), float(r.wait)) for r in rows]


def quarantined(conn: Connection, step_id: str, name: str | None = None) -> list[FailedItem]:
    """Return the items given up on."""
    rows = query(
        conn,
        """SELECT cursor, item, tries, error FROM byrd.failed_items WHERE step_id = %(id)s AND quarantined
             AND (%(name)s::text IS NULL OR name = %(name)s) ORDER BY cursor""",
        {"id": step_id, "name": name},
    )
    return [FailedItem(r.cursor, r.item, r.tries, r.error, True) for r in rows]


def list_checkpoints(conn: Connection, run_id: str) -> dict[int, list[tuple[str, Counts]]]:
    """Return the checkpoints of a run by step number."""
    rows = query(
        conn,
        """SELECT s.no, c.name, c.cursor, c.completed, c.failed, c.done FROM byrd.checkpoints c
           JOIN byrd.steps s ON s.id = c.step_id WHERE s.run_id = %(run)s ORDER BY s.no, c.updated_at""",
        {"run": run_id},
    )
    found: dict[int, list[tuple[str, Counts]]] = {}
    for no, name, *counts in rows:
        found.setdefault(no, []).append((name, Counts(*counts)))
    return found


def stop_reason(conn: Connection, step_id: str, attempt: int) -> ControlFlow | None:
    """Return what should stop the step at this checkpoint, if anything does."""
    row = query(
        conn,
        f"""SELECT {_REASON} FROM byrd.steps s
           JOIN byrd.runs r ON r.id = s.run_id LEFT JOIN byrd.workers w ON w.id = s.worker_id
           WHERE s.id = %(id)s AND s.attempt = %(attempt)s AND s.status = 'running'""",
        {"id": step_id, "attempt": attempt},
    ).first()
    if row is None:
        return StaleAttempt(f"step {step_id}: attempt {attempt} does not own it any more")
    return _reason(step_id, row)


def _reason(step_id: str, row: Any) -> ControlFlow | None:
    if row.status == "cancelling":
        return StepCancelled(f"step {step_id}: its run is being cancelled")
    if row.status == "paused":
        return StepHandedBack(f"step {step_id}: its run is paused")
    if row.stopping:
        return StepHandedBack(f"step {step_id}: its worker is shutting down")
    return None
