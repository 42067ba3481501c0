"""Cancelling with terminate: what a run that is being cancelled still runs after its grace time is ended by its worker.

The wish is in the run's row (``terminate_at``), so it outlives whoever had it; each worker looks for its own steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Connection

from byrd.errors import IllegalTransitionError
from byrd.model import RunStatus
from byrd.store import locks, reading, runs, steps
from byrd.store.locks import SHARE_RUN_OF_STEP
from byrd.store.rows import Wakeup, query
from byrd.waits import SUBWORKFLOW

_NOW = "clock_timestamp()"
#: Runs ``r`` whose grace time is over, and what of the steps ``s`` may be ended: what undoes others may not.
_DUE = f"""r.status = 'cancelling' AND r.terminate_at <= {_NOW} AND s.status = 'running' AND s.kind <> 'compensation'"""


#: The runs of a run's sub-workflows that are being cancelled with it.
_CHILDREN = """
SELECT c.id FROM byrd.steps s JOIN byrd.runs c ON c.parent_step = s.id AND c.finished_at IS NULL
 WHERE s.run_id = %(run)s AND s.task = %(task)s AND c.status = 'cancelling' ORDER BY c.id"""


class Doomed(NamedTuple):
    """An attempt that is to be ended, and the process that makes it."""

    step_id: str
    attempt: int
    pid: int


class Ended(NamedTuple):
    """How many attempts of a run were ended with their processes, and how many were only shut out of the run."""

    ended: int
    shut_out: int


def cancel(
    conn: Connection,
    run_id: str,
    *,
    grace: float,
    compensate: bool = False,
    by: str | None = None,
    token: str | None = None,
) -> list[Wakeup]:
    """running or paused → cancelling; from ``grace`` seconds from now on, the workers end what still runs.

    A run that is being cancelled already is hurried: the earlier of two times counts.  So are the workflows within it.
    """
    locks.own_families(conn, [run_id])
    if runs.done_before(conn, run_id, token):
        return []
    before = runs.locked(conn, run_id).status
    wakeups: list[Wakeup] = []
    if before != RunStatus.CANCELLING:
        wakeups = runs.cancel(conn, run_id, compensate=compensate, by=by, token=token)
    elif compensate and not reading.get(conn, run_id).compensate:
        raise IllegalTransitionError(
            f"run {run_id} is being cancelled already, without compensation; ask for terminate alone"
        )
    query(
        conn,
        f"""UPDATE byrd.runs SET terminate_at = least(terminate_at, {_NOW} + %(grace)s * interval '1 second')
            WHERE id = %(run)s AND status = 'cancelling'""",
        {"run": run_id, "grace": grace},
    )
    # Though the run may have ended by this: what goes on of workflows within it is ended by what its history says.
    told = None if before != RunStatus.CANCELLING else token  # an event of its own has it otherwise
    runs.record(conn, run_id, "terminate_requested", {"grace": grace, **({"by": by} if by else {})}, token=told)
    for child in query(conn, _CHILDREN, {"run": run_id, "task": SUBWORKFLOW}).all():
        wakeups += cancel(conn, str(child.id), grace=grace, by=f"run {run_id}")
    return wakeups


def grace_of(conn: Connection, run_id: str) -> float | None:
    """Return the grace time of a run that was cancelled with terminate, and not retried since."""
    found: float | None = query(
        conn,
        """SELECT (detail::json ->> 'grace')::float8 FROM byrd.events
            WHERE run_id = %(run)s AND event = 'terminate_requested' AND id > coalesce(
              (SELECT max(id) FROM byrd.events WHERE run_id = %(run)s AND event = 'retried'), 0)
            ORDER BY id DESC LIMIT 1""",
        {"run": run_id},
    ).scalar()
    return found


def due(conn: Connection, worker_id: str) -> list[Doomed]:
    """Return what this worker is to end."""
    rows = query(
        conn,
        f"""SELECT s.id, s.attempt, s.pid FROM byrd.runs r JOIN byrd.steps s ON s.run_id = r.id
            WHERE {_DUE} AND s.worker_id = %(worker)s ORDER BY r.terminate_at, s.run_id, s.no LIMIT 200""",
        {"worker": worker_id},
    )
    return [Doomed(*row) for row in rows]


def terminate(conn: Connection, one: Doomed, *, worker_id: str, ended: bool) -> list[Wakeup]:
    """running → cancelled: its run is being cancelled, and it did not stop in time.

    ``ended``: its process is gone.  Otherwise the attempt may go on for all we know, but can record nothing any more.
    Nothing happens when the attempt does not own the step any more, or nobody wants it ended.
    """
    params = {"id": one.step_id, "attempt": one.attempt, "pid": one.pid, "worker": worker_id}
    query(conn, f"SELECT 1 FROM {SHARE_RUN_OF_STEP}", params)
    row: Any = query(
        conn,
        f"""SELECT s.run_id, s.no, (SELECT hostname FROM byrd.workers WHERE id = s.worker_id) AS host,
                   (SELECT e.detail::json ->> 'by' FROM byrd.events e
                     WHERE e.run_id = s.run_id AND e.event = 'terminate_requested' ORDER BY e.id DESC LIMIT 1) AS by
              FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
             WHERE s.id = %(id)s AND s.attempt = %(attempt)s AND s.worker_id = %(worker)s AND s.pid = %(pid)s AND {_DUE}
               FOR NO KEY UPDATE OF s""",
        params,
    ).first()
    if row is None:
        return []
    detail = {"worker": row.host, "process": one.pid, "ended": ended, **({"by": row.by} if row.by else {})}
    runs.record(conn, str(row.run_id), "terminated", detail, step_no=row.no)
    return steps.revoke(conn, one.step_id, "terminated", attempt=one.attempt, owner=worker_id, pid=one.pid)


def ended_of(conn: Connection, run_id: str) -> Ended:
    """Return what was ended in a run since it was last retried."""
    row = query(
        conn,
        """SELECT count(*) FILTER (WHERE detail::json ->> 'ended' = 'true') AS ended, count(*) AS total
             FROM byrd.events WHERE run_id = %(run)s AND event = 'terminated' AND id > coalesce(
              (SELECT max(id) FROM byrd.events WHERE run_id = %(run)s AND event = 'retried'), 0)""",
        {"run": run_id},
    ).one()
    return Ended(int(row.ended), int(row.total - row.ended))
