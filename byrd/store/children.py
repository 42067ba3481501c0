"""Sub-workflows: runs that are a step of another run, which waits for their end without a worker.

Locks are taken from the outside in: whatever belongs to the outer run first, then the inner run's.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from byrd.model import RUN_TRANSITIONS, Outcome, sources
from byrd.store import locks, plans, runs, steps
from byrd.store.rows import CHANNEL, Wakeup, query

_NOW = "clock_timestamp()"
#: So many steps are told of the end of their runs in one transaction.
BATCH = 200


@dataclass(frozen=True, slots=True)
class Child:
    """The run that a step stands for, as it is now."""

    id: str
    workflow: str | None
    status: str
    error: str | None


def begin(conn: Connection, step_id: str, attempt: int, new: plans.NewRun) -> tuple[str, list[Wakeup]]:
    """Write the run of a running step, or find it, for each step has one; return its id and what to publish."""
    steps.check_owner(conn, step_id, attempt)
    ids, wakeups = plans.write(conn, [new])
    return ids[0], wakeups


def of_step(conn: Connection, step_id: str) -> Child | None:
    """Return the run that a step has begun."""
    row = query(
        conn,
        "SELECT id::text, workflow, status, error FROM byrd.runs WHERE parent_step = %(step)s",
        {"step": step_id},
    ).first()
    return Child(*row) if row is not None else None


def of_number(conn: Connection, run_id: str, no: int) -> Child | None:
    """Return the run that step ``no`` of a run has begun."""
    step = query(conn, "SELECT id FROM byrd.steps WHERE run_id = %(run)s AND no = %(no)s", {"run": run_id, "no": no})
    step_id = step.scalar()
    return of_step(conn, step_id) if step_id is not None else None


def await_end(conn: Connection, step_id: str, attempt: int) -> list[Wakeup]:
    """running → ready when the step's run has ended, of which it is told."""
    locks.own_run(
        conn, str(query(conn, "SELECT run_id FROM byrd.steps WHERE id = %(id)s", {"id": step_id}).scalar_one())
    )
    wakeups = steps.hand_back(conn, step_id, attempt, delay=1e9)
    # The step's row is locked now: an end that is not seen here is told after this transaction.
    row = query(
        conn,
        f"""UPDATE byrd.steps s SET run_at = at.time,
                   wake_at = CASE WHEN s.wake_at = 'infinity' THEN s.wake_at ELSE at.time END
              FROM (SELECT CASE WHEN EXISTS (SELECT 1 FROM byrd.runs c WHERE c.parent_step = %(id)s
                                              AND c.finished_at IS NULL)
                             THEN 'infinity'::timestamptz ELSE {_NOW} END AS time) at
             WHERE s.id = %(id)s AND s.status = 'ready' AND s.attempt = %(attempt)s AND s.sends = 0
            RETURNING s.run_at <= {_NOW} AS due""",
        {"id": step_id, "attempt": attempt},
    ).first()
    if row is not None and row.due:
        query(conn, f"NOTIFY {CHANNEL}")
    return wakeups


def tell_parents(conn: Connection) -> int:
    """Make due the steps whose runs have ended; return how many runs were told of."""
    ended = query(
        conn,
        """SELECT c.id, c.parent_step FROM byrd.runs c
            WHERE c.parent_step IS NOT NULL AND c.finished_at IS NOT NULL AND NOT c.parent_told
            ORDER BY c.finished_at LIMIT %(limit)s""",
        {"limit": BATCH},
    ).all()
    if not ended:
        return 0
    query(
        conn,
        f"""UPDATE byrd.steps s SET run_at = {_NOW}, sends = 0,
                   wake_at = CASE WHEN r.status = 'running' THEN {_NOW} ELSE s.wake_at END
              FROM byrd.runs r
             WHERE s.id IN (SELECT w.id FROM byrd.steps w WHERE w.id = ANY(%(steps)s) AND w.status = 'ready'
                               AND w.run_at = 'infinity' ORDER BY w.id FOR NO KEY UPDATE)
               AND r.id = s.run_id AND s.status = 'ready' AND s.run_at = 'infinity'""",
        {"steps": [row.parent_step for row in ended]},
    )
    query(
        conn,
        "UPDATE byrd.runs SET parent_told = true WHERE id = ANY(%(runs)s::uuid[]) AND finished_at IS NOT NULL",
        {"runs": [str(row.id) for row in ended]},
    )
    return len(ended)


def abandoned(conn: Connection) -> list[tuple[str, str]]:
    """Return runs that go on though their step has ended without them, each with that step's run."""
    rows = query(
        conn,
        """SELECT c.id::text, s.run_id::text FROM byrd.runs c JOIN byrd.steps s ON s.id = c.parent_step
            WHERE c.parent_step IS NOT NULL AND c.finished_at IS NULL AND c.status IN ('running','paused')
              AND s.status IN ('succeeded','failed','skipped','cancelled') LIMIT %(limit)s""",
        {"limit": BATCH},
    )
    return [(row[0], row[1]) for row in rows]


def try_again(conn: Connection, step_id: str, attempt: int) -> list[Wakeup]:
    """Begin anew what has failed, or was cancelled, before the step was tried again; else change nothing.

    Its run is retried, and keeps what has succeeded.  One that was rolled back is let go: the step begins another.
    """
    steps.check_owner(conn, step_id, attempt)
    child = query(
        conn,
        f"""SELECT c.id::text, s.run_id::text AS outer_run, EXISTS (
                  SELECT 1 FROM byrd.steps u WHERE u.run_id = c.id AND u.kind = 'compensation') AS undone
             FROM byrd.runs c JOIN byrd.steps s ON s.id = c.parent_step
            WHERE c.parent_step = %(step)s AND c.status = ANY(%(sources)s)
              AND (EXISTS (SELECT 1 FROM byrd.attempts a WHERE a.step_id = s.id AND a.ended_at >= c.finished_at
                              AND a.outcome IN ('{Outcome.FAILED}','{Outcome.RETRIED}'))
                OR EXISTS (SELECT 1 FROM byrd.events e WHERE e.run_id = s.run_id AND e.event = 'retried'
                              AND e.at >= c.finished_at))""",
        {"step": step_id, "sources": sorted(sources(RUN_TRANSITIONS, "retry_run"))},
    ).first()
    if child is None:
        return []
    if child.undone:
        query(conn, "UPDATE byrd.runs SET parent_step = NULL, key = NULL WHERE id = %(run)s::uuid", {"run": child.id})
        return []
    query(conn, "UPDATE byrd.runs SET parent_told = false WHERE id = %(run)s::uuid", {"run": child.id})
    return runs.retry(conn, child.id, by=f"run {child.outer_run}")
