"""Sub-workflows: runs that are a step of another run, which waits for their end without a worker.

When the outer run is rolled back, a compensation of that step has the inner one rolled back, and waits for it.

Whoever needs both runs to himself takes them together, in the order of their ids; rows are locked from the outside in:
those of the outer run first, then the inner run's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection

from byrd.model import RUN_TRANSITIONS, Outcome, RunStatus, sources
from byrd.store import locks, plans, runs, steps
from byrd.store import undo as undoing
from byrd.store.flow import MOVING
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
    """Return the run that step ``no`` of a run has begun, or undoes."""
    step_id = query(
        conn,
        """SELECT coalesce(u.id, s.id) FROM byrd.steps s
             LEFT JOIN byrd.steps u ON u.run_id = s.run_id AND u.no = s.compensates
            WHERE s.run_id = %(run)s AND s.no = %(no)s""",
        {"run": run_id, "no": no},
    ).scalar()
    return of_step(conn, step_id) if step_id is not None else None


def await_end(conn: Connection, step_id: str, attempt: int) -> list[Wakeup]:
    """running → ready when the step's run has ended, of which it is told.

    For its compensation: when it is undone, or its rollback is stuck.
    """
    locks.own_run_of(conn, step_id)
    wakeups = steps.hand_back(conn, step_id, attempt, delay=1e9)
    # The step's row is locked now: an end that is not seen here is told after this transaction.  Where the answer to
    # this was lost, the step waits already, and the end may have come since.
    row = query(
        conn,
        f"""UPDATE byrd.steps s SET run_at = at.time, wake_at = CASE WHEN r.status IN {MOVING} THEN at.time
                                                                    ELSE s.wake_at END
              FROM byrd.runs r, (SELECT CASE WHEN EXISTS (
                        SELECT 1 FROM byrd.steps o
                          LEFT JOIN byrd.steps u ON u.run_id = o.run_id AND u.no = o.compensates
                          JOIN byrd.runs c ON c.parent_step = coalesce(u.id, o.id) AND c.finished_at IS NULL
                         WHERE o.id = %(id)s AND (u.id IS NULL OR c.status <> 'rollback_stuck'))
                      THEN 'infinity'::timestamptz ELSE {_NOW} END AS time) at
             WHERE s.id = %(id)s AND s.status = 'ready' AND s.attempt = %(attempt)s AND s.sends = 0
               AND r.id = s.run_id RETURNING s.run_at <= {_NOW} AS due""",
        {"id": step_id, "attempt": attempt},
    ).first()
    if row is not None and row.due:
        query(conn, f"NOTIFY {CHANNEL}")
    return wakeups


#: The runs ``c`` whose step ``s``, or its compensation ``u``, is to hear that they have ended, or that their rollback
#: is stuck.  One that runs just now might not hear of it, so it is told when it has seen for itself.
_UNTOLD = """byrd.runs c
  LEFT JOIN byrd.steps s ON s.id = c.parent_step LEFT JOIN byrd.steps u ON u.run_id = s.run_id AND u.compensates = s.no
 WHERE c.parent_step IS NOT NULL AND NOT c.parent_told AND (c.finished_at IS NOT NULL OR c.status = 'rollback_stuck')
   AND s.status IS DISTINCT FROM 'running' AND u.status IS DISTINCT FROM 'running'"""
#: The compensation had failed because the run's rollback was stuck, which now is over.
_UNSTUCK = "coalesce(u.status IN ('failed','cancelled') AND c.finished_at IS NOT NULL, false)"


class Unstuck(NamedTuple):
    """A run that has ended after all, and the compensation that failed meanwhile: its run, its number."""

    child: str
    outer: str
    no: int


def tell_parents(conn: Connection) -> tuple[int, list[Unstuck]]:
    """Make due the steps whose runs have ended.

    Returns of how many runs they were, and those of them for which :func:`go_on` is to be called.
    """
    rows = query(
        conn,
        f"""SELECT c.id::text, c.parent_step, u.id AS undo, u.run_id::text AS outer_run, u.no,
                   c.finished_at IS NOT NULL AS over, {_UNSTUCK} AS unstuck
              FROM {_UNTOLD} ORDER BY c.finished_at LIMIT %(limit)s""",
        {"limit": BATCH},
    ).all()
    ended = [row for row in rows if not row.unstuck]
    told = [row.parent_step for row in ended if row.over] + [row.undo for row in ended if row.undo is not None]
    if told:
        query(
            conn,
            f"""UPDATE byrd.steps s SET run_at = {_NOW}, sends = 0,
                       wake_at = CASE WHEN r.status IN {MOVING} THEN {_NOW} ELSE s.wake_at END
                  FROM byrd.runs r
                 WHERE s.id IN (SELECT w.id FROM byrd.steps w WHERE w.id = ANY(%(steps)s) AND w.status = 'ready'
                                   AND w.run_at = 'infinity' ORDER BY w.id FOR NO KEY UPDATE)
                   AND r.id = s.run_id AND s.status = 'ready' AND s.run_at = 'infinity'""",
            {"steps": told},
        )
    if ended:
        query(  # those whose steps wait are about another end by now, which is told next
            conn,
            """UPDATE byrd.runs c SET parent_told = true
                WHERE id = ANY(%(runs)s::uuid[]) AND (finished_at IS NOT NULL OR status = 'rollback_stuck')
                  AND NOT EXISTS (
                    SELECT 1 FROM byrd.steps s LEFT JOIN byrd.steps u ON u.run_id = s.run_id AND u.compensates = s.no
                     WHERE s.id = c.parent_step AND (u.status = 'ready' AND u.run_at = 'infinity'
                        OR s.status = 'ready' AND s.run_at = 'infinity' AND c.finished_at IS NOT NULL))""",
            {"runs": [row.id for row in ended]},
        )
    return len(rows), [Unstuck(row.id, row.outer_run, row.no) for row in rows if row.unstuck]


def go_on(conn: Connection, one: Unstuck) -> list[Wakeup]:
    """Have a rollback go on that was stuck because a run within it was."""
    wakeups = runs.retry_undo(conn, one.outer, one.no, by=f"run {one.child}")
    query(
        conn,
        "UPDATE byrd.runs SET parent_told = true WHERE id = %(run)s::uuid AND finished_at IS NOT NULL",
        {"run": one.child},
    )
    return wakeups


def undo(conn: Connection, step_id: str, attempt: int, *, reason: str) -> tuple[Child | None, list[Wakeup]]:
    """Have the run rolled back that a compensation undoes: stopped first, if it goes on, or tried again if it is stuck.

    Returns it, None when there is nothing to undo in it, and what to publish.  One that passed its pivot keeps all.
    A rollback that is stuck is tried again once this compensation has failed because of it, and is tried again itself.
    """
    found = query(
        conn,
        """SELECT c.id::text, u.run_id::text AS outer_run, s.id AS undone FROM byrd.steps u
             JOIN byrd.steps s ON s.run_id = u.run_id AND s.no = u.compensates
             JOIN byrd.runs c ON c.parent_step = s.id WHERE u.id = %(step)s""",
        {"step": step_id},
    ).first()
    if found is None:
        return None, []
    locks.own_families(conn, [found.outer_run, found.id])
    steps.check_owner(conn, step_id, attempt)
    run = runs.locked(conn, found.id)
    by = f"run {found.outer_run}"
    if run.pivot is not None:
        return None, []
    wakeups: list[Wakeup] = []
    if run.status in sources(RUN_TRANSITIONS, "cancel"):
        wakeups = runs.cancel(conn, found.id, compensate=True, by=by, reason=reason)
    elif run.status == RunStatus.ROLLBACK_STUCK and _failed_of_it(conn, step_id, found.id):
        wakeups = runs.retry(conn, found.id, by=by)
    elif run.status in sources(RUN_TRANSITIONS, "roll_back"):
        if not undoing.compensable(conn, found.id):
            return None, []
        wakeups = runs.roll_back(conn, found.id, reason=reason, by=by)
    return of_step(conn, found.undone), wakeups


def _failed_of_it(conn: Connection, step_id: str, child: str) -> bool:
    """Tell whether a compensation has failed since the rollback of its run is stuck."""
    sql = """SELECT 1 FROM byrd.attempts a WHERE a.step_id = %(step)s AND a.outcome = 'failed' AND a.ended_at >=
              (SELECT max(e.at) FROM byrd.events e WHERE e.run_id = %(run)s::uuid AND e.event = 'rollback_stuck')
              LIMIT 1"""
    return query(conn, sql, {"step": step_id, "run": child}).first() is not None


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


#: From when on the run ``c``, which has ended badly, could end in no other way: since somebody asked for that, perhaps,
#: and its last step took its time.
_DOOMED_AT = """coalesce((SELECT max(k.at) FROM byrd.events k
    WHERE k.run_id = c.id AND k.event IN ('cancel_requested','rollback_requested') AND k.id > coalesce(
      (SELECT max(b.id) FROM byrd.events b WHERE b.run_id = c.id AND b.event = 'retried'), 0)), c.finished_at)"""


def try_again(conn: Connection, step_id: str, attempt: int) -> list[Wakeup]:
    """Begin anew what has failed, or was cancelled, before the step was tried again; else change nothing.

    Its run is retried, and keeps what has succeeded.  One that was rolled back is let go: the step begins another.  Not
    so one of which a part was undone, and another is kept, which would be done again: nothing changes.
    """
    steps.check_owner(conn, step_id, attempt)
    child = query(
        conn,
        f"""SELECT c.id::text, c.pivot, s.run_id::text AS outer_run, EXISTS (
                  SELECT 1 FROM byrd.steps u WHERE u.run_id = c.id AND u.kind = 'compensation') AS undone
             FROM byrd.runs c JOIN byrd.steps s ON s.id = c.parent_step
            WHERE c.parent_step = %(step)s AND c.status = ANY(%(sources)s)
              AND (EXISTS (SELECT 1 FROM byrd.attempts a WHERE a.step_id = s.id AND a.ended_at >= c.finished_at
                              AND a.outcome IN ('{Outcome.FAILED}','{Outcome.RETRIED}'))
                OR EXISTS (SELECT 1 FROM byrd.events e WHERE e.run_id = s.run_id AND e.event = 'retried'
                              AND e.at >= {_DOOMED_AT}))""",
        {"step": step_id, "sources": sorted(sources(RUN_TRANSITIONS, "retry_run"))},
    ).first()
    if child is None:
        return []
    if child.undone:
        if child.pivot is None and not undoing.compensable(conn, child.id):
            let_go = "UPDATE byrd.runs SET parent_step = NULL, key = NULL WHERE id = %(run)s::uuid"
            query(conn, let_go, {"run": child.id})
        return []
    return runs.retry(conn, child.id, by=f"run {child.outer_run}")
