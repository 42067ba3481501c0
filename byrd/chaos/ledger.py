"""Chaos's own tables: what the tasks of the load did to the world, written outside of Byrd's transactions.

They are in the schema ``byrd_chaos`` of Byrd's database, and hold nothing that Byrd reads.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection

from byrd.store.rows import query

SCHEMA = "byrd_chaos"
#: The key of a Postgres advisory lock: CREATE SCHEMA IF NOT EXISTS fails when two do it at once.
_LOCK = 0x62797264_02

_TABLES = """
CREATE SCHEMA IF NOT EXISTS byrd_chaos;
CREATE TABLE IF NOT EXISTS byrd_chaos.effects (
    id uuid PRIMARY KEY, run_id uuid NOT NULL, step_id text NOT NULL, attempt int NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp());
ALTER TABLE byrd_chaos.effects ADD COLUMN IF NOT EXISTS worker_id uuid, ADD COLUMN IF NOT EXISTS pid int;
CREATE INDEX IF NOT EXISTS effects_run ON byrd_chaos.effects (run_id);
CREATE INDEX IF NOT EXISTS effects_at ON byrd_chaos.effects (at);
CREATE TABLE IF NOT EXISTS byrd_chaos.items (
    run_id uuid NOT NULL, step_id text NOT NULL, item int NOT NULL, attempt int NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE INDEX IF NOT EXISTS items_run ON byrd_chaos.items (run_id);
CREATE TABLE IF NOT EXISTS byrd_chaos.completions (
    run_id uuid NOT NULL, step_id text NOT NULL, attempt int NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE INDEX IF NOT EXISTS completions_run ON byrd_chaos.completions (run_id);
"""

_WATCH = """
CREATE OR REPLACE FUNCTION byrd_chaos.note_completion() RETURNS trigger LANGUAGE plpgsql AS $$
  BEGIN
    INSERT INTO byrd_chaos.completions (run_id, step_id, attempt) VALUES (NEW.run_id, NEW.id, NEW.attempt);
    RETURN NULL;
  END $$;
CREATE OR REPLACE TRIGGER byrd_chaos_completion AFTER UPDATE OF status, result, finished_at ON byrd.steps FOR EACH ROW
  WHEN (NEW.status = 'succeeded' AND NEW.kind <> 'join')
  EXECUTE FUNCTION byrd_chaos.note_completion();
"""
# UPDATE OF: whoever sets one of these columns on a step that has succeeded records its completion, though it may write
# the very values that were there.


def create(conn: Connection, *, watch: bool) -> None:
    """Make the tables where they are missing.

    ``watch``: also a trigger on ``byrd.steps`` that notes each recorded completion.  It is the best evidence, for a
    row keeps only the last, but only a database of chaos's own may be given a trigger.
    """
    query(conn, "SELECT pg_advisory_xact_lock(%(key)s)", {"key": _LOCK})
    query(conn, _TABLES)
    if watch:
        query(conn, _WATCH)


def record_effect(
    conn: Connection,
    effect: str,
    run_id: str,
    step_id: str,
    attempt: int,
    *,
    worker_id: str | None = None,
    pid: int | None = None,
) -> None:
    """Write an effect, and where it was left: in which process of which worker.

    ``effect`` is this effect's own id: written again after a lost answer, it stays one.
    """
    query(
        conn,
        """INSERT INTO byrd_chaos.effects (id, run_id, step_id, attempt, worker_id, pid)
           VALUES (%(id)s, %(run)s, %(step)s, %(attempt)s, %(worker)s, %(pid)s) ON CONFLICT DO NOTHING""",
        {"id": effect, "run": run_id, "step": step_id, "attempt": attempt, "worker": worker_id, "pid": pid},
    )


def new_effect() -> str:
    """Return an id for an effect."""
    return str(uuid.uuid4())


def record_items(conn: Connection, run_id: str, step_id: str, attempt: int, items: Iterable[int]) -> None:
    """Write the items of a batch, in the transaction that saves the batch's checkpoint."""
    query(
        conn,
        """INSERT INTO byrd_chaos.items (run_id, step_id, item, attempt)
           SELECT %(run)s, %(step)s, item, %(attempt)s FROM unnest(%(items)s::int[]) item""",
        {"run": run_id, "step": step_id, "attempt": attempt, "items": list(items)},
    )


def forget(conn: Connection, run_ids: Sequence[str]) -> None:
    """Delete what these runs left in chaos's tables."""
    for table in ("effects", "items", "completions"):
        query(conn, f"DELETE FROM {SCHEMA}.{table} WHERE run_id = ANY(%(runs)s::uuid[])", {"runs": list(run_ids)})  # noqa: S608 - constants
