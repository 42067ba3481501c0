"""What can be read of a run and its steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from byrd.errors import RunNotFoundError
from byrd.store.rows import RunRow, StepRow, query, rows_of


def get(conn: Connection, run_id: str) -> RunRow:
    """Return the run; raise :class:`RunNotFoundError` when there is none."""
    row = (
        query(conn, f"SELECT {RunRow.columns()} FROM byrd.runs r WHERE r.id = %(run)s", {"run": run_id})
        .mappings()
        .first()
    )
    if row is None:
        raise RunNotFoundError(f"no run has the id {run_id}")
    return RunRow.from_row({**row, "id": str(row["id"])})


def find(conn: Connection, prefix: str) -> list[str]:
    """Return the ids of up to ten runs whose id begins with ``prefix``, hexadecimal digits and hyphens."""
    digits = prefix.replace("-", "")[:32]
    rows = query(
        conn,
        # The range is what the primary key can find; LIKE alone would read every run.
        """SELECT id FROM byrd.runs WHERE id BETWEEN %(low)s::uuid AND %(high)s::uuid
             AND id::text LIKE %(prefix)s LIMIT 10""",
        {"low": digits.ljust(32, "0"), "high": digits.ljust(32, "f"), "prefix": f"{prefix}%"},
    )
    return [str(row.id) for row in rows]


def list_runs(
    conn: Connection, *, workflow: str | None = None, statuses: Sequence[str] | None = None, limit: int = 50
) -> list[RunRow]:
    """Return the newest runs, newest first."""
    # One branch for each status: with = ANY() the index on it would lose its order.
    wanted: dict[str, str] = {f"status{i}": status for i, status in enumerate(sorted(set(statuses or ())))}
    conditions = [f"r.status = %({name})s" for name in wanted] if statuses is not None else ["true"]
    mine = "r.workflow = %(workflow)s" if workflow is not None else "true"
    branches = [
        f"(SELECT * FROM byrd.runs r WHERE {condition} AND {mine} ORDER BY r.created_at DESC LIMIT %(limit)s)"
        for condition in conditions or ["false"]
    ]
    rows = query(
        conn,
        f"""SELECT {RunRow.columns()} FROM ({" UNION ALL ".join(branches)}) r
            ORDER BY r.created_at DESC LIMIT %(limit)s""",
        {"workflow": workflow, "limit": limit, **wanted},
    ).mappings()
    return [RunRow.from_row({**row, "id": str(row["id"])}) for row in rows]


def list_steps(conn: Connection, run_id: str, *, most_items: int | None = None) -> list[StepRow]:
    """Return the steps of a run in the plan's order; of an each's items, no more than so many in each state."""
    which = (
        ""
        if most_items is None
        else """ AND (s.kind <> 'item' OR s.no IN
        (SELECT no FROM (SELECT no, row_number() OVER (PARTITION BY join_no, status ORDER BY join_pos) AS place
                           FROM byrd.steps WHERE run_id = %(run)s AND kind = 'item') m WHERE place <= %(most)s))"""
    )
    rows = query(
        conn,
        f"SELECT {StepRow.columns()} FROM byrd.steps s WHERE s.run_id = %(run)s{which} ORDER BY s.no",
        {"run": run_id, "most": most_items},
    )
    return [_step(row) for row in rows.mappings()]


def get_step(conn: Connection, step_id: str) -> StepRow | None:
    """Return one step by its id, which is its Celery task id."""
    row = (
        query(conn, f"SELECT {StepRow.columns()} FROM byrd.steps s WHERE s.id = %(id)s", {"id": step_id})
        .mappings()
        .first()
    )
    return _step(row) if row is not None else None


def _step(row: Any) -> StepRow:
    worker = row["worker_id"]
    return StepRow.from_row({**row, "run_id": str(row["run_id"]), "worker_id": str(worker) if worker else None})


def outcome(conn: Connection, run_id: str, no: int | None = None) -> tuple[int, str, str | None, str | None, str, bool]:
    """Return (number, step status, result, error, run status, ignored) of a step, or of the one with the run's value.

    A step that was skipped bears its cause's error.
    """
    found = rows_of(conn, "SELECT * FROM byrd.outcome(%(run)s, %(no)s)", {"run": run_id, "no": no})
    if not found:
        raise RunNotFoundError(f"no run has the id {run_id}")
    [(number, status, result, error, run_status, ignored)] = found
    return number, status, result, error, run_status, ignored


def root_error(conn: Connection, run_id: str, no: int) -> str | None:
    """Return the error (JSON) that a step's failure goes back to.

    It is what ``get()`` raises for a canvas in Celery, eager and on a worker, where the body of a chord bears only a
    ChordError that tells of it.
    """
    found: str | None = query(
        conn,
        """WITH RECURSIVE back AS (
              SELECT no, error, cause, 0 AS distance FROM byrd.steps WHERE run_id = %(run)s AND no = %(no)s
              UNION ALL
              SELECT s.no, s.error, s.cause, b.distance + 1 FROM byrd.steps s JOIN back b ON s.no = b.cause
               WHERE s.run_id = %(run)s)
           SELECT error FROM back WHERE error IS NOT NULL ORDER BY distance DESC LIMIT 1""",
        {"run": run_id, "no": no},
    ).scalar()
    return found


def history(conn: Connection, run_id: str) -> list[dict[str, Any]]:
    """Return what happened to a run, in order: its own events, and each attempt at each step."""
    rows = query(
        conn,
        """SELECT at, event, step_no, NULL::int AS attempt, NULL AS worker, detail FROM byrd.events
            WHERE run_id = %(run)s
           UNION ALL
           SELECT a.ended_at, a.outcome, s.no, a.attempt, a.worker, a.error FROM byrd.attempts a
             JOIN byrd.steps s ON s.id = a.step_id WHERE s.run_id = %(run)s
           UNION ALL
           SELECT s.finished_at, 'step_' || s.status, s.no, s.attempt, NULL, s.error FROM byrd.steps s
            WHERE s.run_id = %(run)s AND s.finished_at IS NOT NULL AND s.kind <> 'join'
           ORDER BY 1, 3 NULLS FIRST""",
        {"run": run_id},
    ).mappings()
    return [{**row, "detail": json.loads(row["detail"]) if row["detail"] else None} for row in rows]


def attempts(conn: Connection, run_id: str) -> list[dict[str, Any]]:
    """Return the attempts of a run's steps that did not end in success, oldest first."""
    rows = query(
        conn,
        """SELECT s.no, a.attempt, a.outcome, a.error, a.worker, a.started_at, a.ended_at FROM byrd.attempts a
           JOIN byrd.steps s ON s.id = a.step_id WHERE s.run_id = %(run)s ORDER BY a.ended_at""",
        {"run": run_id},
    ).mappings()
    return [dict(row) for row in rows]
