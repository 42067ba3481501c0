"""The transitions of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from byrd.errors import IllegalTransitionError, RunNotFoundError
from byrd.model import RUN_TRANSITIONS, RunStatus, sources
from byrd.store import flow, locks, undo
from byrd.store.rows import CHANNEL, WAKEUP, Wakeup, query, wakeups_of
from byrd.waits import SUBWORKFLOW

_NOW = "clock_timestamp()"


def record(
    conn: Connection,
    run_id: str,
    event: str,
    detail: Mapping[str, Any] | None = None,
    *,
    step_no: int | None = None,
    token: str | None = None,
) -> None:
    """Add a line to the run's history."""
    query(
        conn,
        """INSERT INTO byrd.events (run_id, step_no, event, detail, token)
           VALUES (%(run)s, %(no)s, %(event)s, %(detail)s, %(token)s)""",
        {
            "run": run_id, "no": step_no, "event": event, "detail": json.dumps(detail) if detail else None,
            "token": token,
        },
    )  # fmt: skip


# -- transitions -----------------------------------------------------------------------------------
#
# A command's ``token`` is the call's own: when the answer to its commit was lost, the event that it left is found by
# it, and nothing is done again.  ``by`` is who gave it, for the history.


def advance(
    conn: Connection, run_id: str, no: int, join_no: int | None, *, succeeded: bool, pivot: bool = False
) -> list[Wakeup]:
    """Do all that follows from the outcome of step ``no``, the run's end included; return what became ready.

    ``pivot``: from now on the run goes forward only.
    """
    wakeups, still_waiting = flow.advance(conn, run_id, no, join_no, succeeded=succeeded)
    if pivot:
        passed = query(
            conn,
            "UPDATE byrd.runs SET pivot = %(no)s WHERE id = %(run)s AND pivot IS NULL RETURNING 1",
            {"run": run_id, "no": no},
        )
        if passed.first():
            record(conn, run_id, "pivot_passed", step_no=no)
    return wakeups if wakeups or still_waiting else finish_if_done(conn, run_id)


def finish_if_done(conn: Connection, run_id: str) -> list[Wakeup]:
    """running, paused, cancelling or compensating → what follows, once no step is open any more.

    The run's row is locked first, so that of two last steps that end at once the second sees the first.
    """
    run = query(
        conn,
        "SELECT status, outcome, compensate, pivot, error FROM byrd.runs WHERE id = %(run)s FOR NO KEY UPDATE",
        {"run": run_id},
    ).first()
    if run is None or _is_open(conn, run_id):
        return []
    if run.status in sources(RUN_TRANSITIONS, "finish"):
        outcome = "failed" if _has_failed(conn, run_id) else "succeeded"
        if outcome == "failed" and run.pivot is None and undo.compensable(conn, run_id):
            cause = undo.cause_of(conn, run_id)
            if cause is not None:
                return _compensate(conn, run_id, "finish", outcome, {"cause": cause})
        _finish(conn, run_id, "finish", outcome)
    elif run.status in sources(RUN_TRANSITIONS, "finish_cancel"):
        outcome = run.outcome or "cancelled"
        # A pivot that was running when the cancel came, and has succeeded since: nothing is rolled back any more.
        if run.compensate and run.pivot is None and undo.compensable(conn, run_id):
            return _compensate(conn, run_id, "finish_cancel", outcome, _asked(conn, run_id, "cancel_requested"))
        _finish(conn, run_id, "finish_cancel", outcome)
    elif run.status in sources(RUN_TRANSITIONS, "finish_rollback"):
        _finish(conn, run_id, "finish_rollback", run.outcome)
    return []


def _is_open(conn: Connection, run_id: str) -> bool:
    """Tell whether a step of the run can still change; those of an errback that nobody called end with their run."""
    going = "SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND status IN ('ready','running','waiting') LIMIT 1"
    if query(conn, going, {"run": run_id}).first():
        return True
    waiting = """
        WITH RECURSIVE uncalled AS (
          SELECT no FROM byrd.steps WHERE run_id = %(run)s AND status = 'pending' AND on_failure
          UNION
          SELECT s.no FROM byrd.steps s JOIN uncalled u ON s.after = u.no
           WHERE s.run_id = %(run)s AND s.status = 'pending')
        SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND status = 'pending' AND no NOT IN (SELECT no FROM uncalled)
         LIMIT 1"""
    return query(conn, waiting, {"run": run_id}).first() is not None


def pause(conn: Connection, run_id: str, *, by: str | None = None, token: str | None = None) -> None:
    """running → paused.  What runs goes on to its next checkpoint; nothing else starts."""
    if done_before(conn, run_id, token):
        return
    _move(conn, run_id, "pause", "paused")
    _hold(conn, run_id)
    record(conn, run_id, "paused", _by(by), token=token)


def resume(conn: Connection, run_id: str, *, by: str | None = None, token: str | None = None) -> list[Wakeup]:
    """paused → running."""
    if done_before(conn, run_id, token):
        return []
    _move(conn, run_id, "resume", "running")
    record(conn, run_id, "resumed", _by(by), token=token)
    return _wake(conn, run_id) or finish_if_done(conn, run_id)


def cancel(
    conn: Connection,
    run_id: str,
    *,
    compensate: bool = False,
    outcome: str = "cancelled",
    error: str | None = None,
    by: str | None = None,
    reason: str | None = None,
    token: str | None = None,
) -> list[Wakeup]:
    """running or paused → cancelling.  What has not started never will; what runs stops at its next checkpoint.

    Raises :class:`IllegalTransitionError`, too, when it is to ``compensate`` and the run's pivot has succeeded; one
    that is stopped for its deadline, an ``error``, is not compensated then.
    """
    locks.own_families(conn, [run_id])
    if done_before(conn, run_id, token):
        return []
    run = locked(conn, run_id)
    if compensate and run.pivot is not None:
        if error is None:
            raise _past_pivot(run_id, run.pivot)
        compensate = False
    stopped = query(
        conn,
        """UPDATE byrd.runs SET status = 'cancelling', compensate = %(compensate)s, outcome = %(outcome)s,
                  error = %(error)s WHERE id = %(run)s AND status = ANY(%(sources)s) RETURNING id""",
        {"run": run_id, "compensate": compensate, "outcome": outcome, "error": error, "sources": _sources("cancel")},
    ).first()
    if stopped is None:
        raise _illegal(run_id, run.status, "cancel")
    query(
        conn,
        f"""UPDATE byrd.steps SET status = 'cancelled', finished_at = {_NOW}, error = %(error)s, limit_slot = NULL
            WHERE run_id = %(run)s AND status IN ('pending','ready','waiting')
              AND kind <> 'compensation' AND NOT (kind = 'saga' AND status = 'waiting')""",
        {"run": run_id, "error": error or flow.error_json("TaskRevokedError", "celery.exceptions", ["cancelled"])},
    )
    detail = {"compensate": compensate, "outcome": outcome, **_by(by), **({"reason": reason} if reason else {})}
    record(conn, run_id, "cancel_requested", detail, token=token)
    wakeups: list[Wakeup] = []
    for child in query(conn, _CHILDREN, {"run": run_id, "task": SUBWORKFLOW, "sources": _sources("cancel")}).all():
        undo_child = compensate and child.pivot is None  # else it goes forward only, and keeps what it has done
        wakeups += cancel(conn, str(child.id), compensate=undo_child, by=f"run {run_id}")
    # A saga that had failed before undoes what it had done, whatever else is to become of the run.
    undoing = "SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND status IN ('ready','waiting') LIMIT 1"
    woken = _wake(conn, run_id) if query(conn, undoing, {"run": run_id}).first() else []
    return wakeups + (woken or finish_if_done(conn, run_id))


#: The open runs of a run's sub-workflows, which end with it.
_CHILDREN = """
SELECT c.id, c.pivot FROM byrd.steps s JOIN byrd.runs c ON c.parent_step = s.id AND c.finished_at IS NULL
 WHERE s.run_id = %(run)s AND s.task = %(task)s AND c.status = ANY(%(sources)s) ORDER BY c.id"""


def roll_back(
    conn: Connection, run_id: str, *, reason: str | None = None, by: str | None = None, token: str | None = None
) -> list[Wakeup]:
    """succeeded, failed or cancelled → compensating; paused → cancelling, and then it is compensated.

    Raises :class:`IllegalTransitionError` for another status, after a pivot, and when there is nothing to undo.
    """
    locks.own_families(conn, [run_id])
    if done_before(conn, run_id, token):
        return []
    run = locked(conn, run_id)
    if run.pivot is not None:
        raise _past_pivot(run_id, run.pivot)
    if run.status == "paused":
        if not undo.compensable_once_stopped(conn, run_id):
            raise _nothing_to_undo(run_id, "has completed, or runs; `byrd cancel` ends it")
        return cancel(conn, run_id, compensate=True, by=by, reason=reason, token=token)
    if run.status not in sources(RUN_TRANSITIONS, "roll_back"):
        allowed = ", ".join(sorted(str(s) for s in sources(RUN_TRANSITIONS, "roll_back")))
        raise IllegalTransitionError(
            f"run {run_id} is {run.status}: a rollback needs it to be {allowed} or paused; "
            "pause it first, or cancel it with its compensations"
        )
    if not undo.compensable(conn, run_id):
        raise _nothing_to_undo(run_id, "has completed")
    detail = {**_by(by), **({"reason": reason} if reason else {})}
    record(conn, run_id, "rollback_requested", detail, token=token)
    query(
        conn,
        """UPDATE byrd.runs SET finished_at = NULL, status = 'compensating', parent_told = false
            WHERE id = %(run)s AND status = ANY(%(sources)s)""",
        {"run": run_id, "sources": _sources("roll_back")},
    )
    return _compensate(conn, run_id, "finish_rollback", "cancelled", detail)


def stick(conn: Connection, run_id: str, step_no: int) -> None:
    """running, paused, cancelling or compensating → rollback_stuck: a compensation used up its retries.

    Somebody outside is told of each, if the deployment says whom; so is the rollback that this one is a part of.
    """
    params = {"run": run_id, "no": step_no, "sources": _sources("stick")}
    moved = query(
        conn,
        """UPDATE byrd.runs SET status = 'rollback_stuck', parent_told = false
            WHERE id = %(run)s AND status = ANY(%(sources)s) RETURNING parent_step""",
        params,
    ).first()
    if moved is not None:
        record(conn, run_id, "rollback_stuck", step_no=step_no)
        query(conn, "INSERT INTO byrd.notices (run_id, step_no) VALUES (%(run)s, %(no)s)", params)
        if moved.parent_step is not None:
            query(conn, f"NOTIFY {CHANNEL}")


def go_on_undoing(conn: Connection, run_id: str, saga: int | None) -> list[Wakeup]:
    """A compensation is done, or needs not be: do all that follows."""
    wakeups, done = undo.release_next(conn, run_id, saga)
    if not done:
        return wakeups
    if saga is not None:
        flow.look_at_sagas(conn, run_id)
        return []
    return finish_if_done(conn, run_id)


def unstick(conn: Connection, run_id: str) -> list[Wakeup]:
    """rollback_stuck → what the run was before, unless another compensation of it is stuck.

    One that was paused is paused again: what is due goes on when it is resumed.
    """
    params = {"run": run_id}
    stuck = """SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND compensates IS NOT NULL
                 AND status IN ('failed','cancelled') LIMIT 1"""
    if query(conn, stuck, params).first():
        return []
    was = query(
        conn,
        """SELECT CASE WHEN EXISTS (SELECT 1 FROM byrd.steps s WHERE s.run_id = r.id AND s.compensates IS NOT NULL
                                     AND s.saga IS NULL) THEN 'compensating'
                       WHEN r.outcome IS NOT NULL THEN 'cancelling'
                       WHEN 'paused' = (SELECT e.event FROM byrd.events e WHERE e.run_id = r.id
                                         AND e.event IN ('paused','resumed','retried') ORDER BY e.id DESC LIMIT 1)
                       THEN 'paused' ELSE 'running' END
             FROM byrd.runs r WHERE r.id = %(run)s""",
        params,
    ).scalar_one()
    _move(conn, run_id, "retry_rollback", was)
    query(conn, "UPDATE byrd.runs SET parent_told = false WHERE id = %(run)s AND parent_told", params)
    if was == RunStatus.PAUSED:
        _hold(conn, run_id)
        return []
    wakeups = _wake(conn, run_id)
    open_rollbacks = query(
        conn,
        """SELECT DISTINCT saga FROM byrd.steps
            WHERE run_id = %(run)s AND compensates IS NOT NULL AND status = 'pending'""",
        params,
    ).all()
    for row in open_rollbacks:
        wakeups += undo.release_next(conn, run_id, row.saga)[0]
    return wakeups or finish_if_done(conn, run_id)


def retry_undo(conn: Connection, run_id: str, no: int, *, by: str) -> list[Wakeup]:
    """rollback_stuck → what it was before: one compensation that failed is tried again, if it has; else nothing."""
    if locked(conn, run_id).status != "rollback_stuck":
        return []
    which = "no = %(no)s AND kind = 'compensation' AND status IN ('failed','cancelled')"
    if not reopen(conn, run_id, which, {"no": no}):
        return []
    record(conn, run_id, "rollback_retried", _by(by), step_no=no)
    return unstick(conn, run_id)


def retry(conn: Connection, run_id: str, *, by: str | None = None, token: str | None = None) -> list[Wakeup]:
    """failed or cancelled → running: what succeeded is kept, the rest runs again; a new failure calls errbacks anew.

    rollback_stuck → what it was before: the compensations that failed are tried again.
    """
    if done_before(conn, run_id, token):
        return []
    run = locked(conn, run_id)
    if run.status == "rollback_stuck":
        reopen(conn, run_id, "kind = 'compensation' AND status IN ('failed','cancelled')")
        record(conn, run_id, "rollback_retried", _by(by), token=token)
        return unstick(conn, run_id)
    if run.status not in sources(RUN_TRANSITIONS, "retry_run"):
        raise _illegal(run_id, run.status, "retry_run")
    _refuse_if_left_alone(conn, run_id)
    if query(
        conn, "SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND kind = 'compensation' LIMIT 1", {"run": run_id}
    ).first():
        raise IllegalTransitionError(f"run {run_id} was rolled back; its steps were undone, so submit it anew")
    query(
        conn,
        """UPDATE byrd.runs r SET status = 'running', finished_at = NULL, outcome = NULL, error = NULL,
                  compensate = false, terminate_at = NULL, parent_told = false,
                  deadline = clock_timestamp() + (deadline - coalesce((SELECT max(e.at) FROM byrd.events e
                                                    WHERE e.run_id = r.id AND e.event = 'retried'), created_at))
            WHERE id = %(run)s AND status = ANY(%(sources)s)""",
        {"run": run_id, "sources": _sources("retry_run")},
    )
    called = _recall_errbacks(conn, run_id)
    # Items are for their each to try again, a page at a time, unless it has succeeded without them.
    reopen(conn, run_id, "status IN ('failed','skipped','cancelled') AND kind <> 'item'")
    query(  # only now, for nothing is changed in a step that has ended
        conn,
        """UPDATE byrd.steps SET replaced = false, waiting = 0
           WHERE run_id = %(run)s AND no = ANY(%(called)s) AND replaced""",
        {"run": run_id, "called": called},
    )
    record(conn, run_id, "retried", _by(by), token=token)
    return _resume_pending(conn, run_id)


def _refuse_if_left_alone(conn: Connection, run_id: str) -> None:
    """Raise :class:`IllegalTransitionError` for a run whose step has ended: nobody would take what it comes to."""
    of = query(
        conn,
        """SELECT s.run_id::text, s.no FROM byrd.runs r JOIN byrd.steps s ON s.id = r.parent_step
            WHERE r.id = %(run)s AND s.status IN ('succeeded','failed','skipped','cancelled')""",
        {"run": run_id},
    ).first()
    if of is not None:
        raise IllegalTransitionError(
            f"run {run_id} is the work of step {of.no} of run {of.run_id}, which has ended: retry that run"
        )


def _resume_pending(conn: Connection, run_id: str) -> list[Wakeup]:
    """After a reopening: count again what joins wait for, and make ready what waits for nothing open."""
    params = {"run": run_id}
    query(
        conn,
        """UPDATE byrd.steps j SET waiting = (SELECT count(*) FROM byrd.steps m WHERE m.run_id = j.run_id
                  AND m.join_no = j.no AND m.status <> 'succeeded')
           WHERE j.run_id = %(run)s AND j.status = 'pending' AND (j.kind IN ('join','saga') OR j.replaced)""",
        params,
    )
    rows = query(
        conn,
        """SELECT s.no FROM byrd.steps s LEFT JOIN byrd.steps p ON p.run_id = s.run_id AND p.no = s.after
           WHERE s.run_id = %(run)s AND s.status = 'pending' AND s.kind NOT IN ('join','saga','item') AND NOT s.replaced
             AND NOT s.on_failure AND (s.after IS NULL OR p.status = 'succeeded')""",
        params,
    )
    wakeups = flow.release(conn, run_id, [row.no for row in rows])
    # A join whose members had all succeeded before the run was cancelled waits for nothing: it ends now.
    ended = query(
        conn,
        """SELECT j.no, j.kind FROM byrd.steps j LEFT JOIN byrd.steps p ON p.run_id = j.run_id AND p.no = j.after
           WHERE j.run_id = %(run)s AND j.status = 'pending' AND (j.kind IN ('join','saga') OR j.replaced)
             AND j.waiting = 0
             AND NOT j.on_failure AND (j.after IS NULL OR p.status = 'succeeded') ORDER BY j.no""",
        params,
    ).all()
    for no, kind in ended:
        still = query(
            conn, "SELECT status FROM byrd.steps WHERE run_id = %(run)s AND no = %(no)s", {**params, "no": no}
        ).one()
        if still.status == "pending":
            ok, join_no = flow.finish_join(conn, run_id, no, is_join=kind == "join")
            wakeups += advance(conn, run_id, no, join_no, succeeded=ok)
    return wakeups or finish_if_done(conn, run_id)


#: Errbacks and what comes after them, with the steps that took the place of some of these or joined their groups.
#: An errback's predecessor is what it watches over; that of any other step belongs to it.
_CALLED = """
    WITH RECURSIVE called AS (
      SELECT no, after, on_failure FROM byrd.steps WHERE run_id = %(run)s AND on_failure
      UNION
      SELECT s.no, s.after, s.on_failure FROM called c JOIN byrd.steps s ON s.run_id = %(run)s
         AND (s.after = c.no OR s.join_no = c.no OR (s.no = c.after AND NOT c.on_failure))),
    grown AS (
      SELECT no FROM called WHERE after IS NULL
      UNION
      SELECT s.no FROM grown g JOIN byrd.steps s ON s.run_id = %(run)s AND s.after = g.no)"""


def _recall_errbacks(conn: Connection, run_id: str) -> list[int]:
    """succeeded → pending: errbacks that were called may be called again, from their beginning.

    So what they replaced themselves by, or added to their chords, is deleted: they may do otherwise this time.  Returns
    their numbers, and those of what comes after them.
    """
    params = {"run": run_id}
    query(
        conn,
        f"{_CALLED} DELETE FROM byrd.steps WHERE run_id = %(run)s AND no IN (SELECT no FROM grown)",
        params,
    )
    numbers = [row.no for row in query(conn, f"{_CALLED} SELECT no FROM called", params)]
    called = {"run": run_id, "called": numbers}
    for table in ("checkpoints", "failed_items"):
        query(
            conn,
            f"""DELETE FROM byrd.{table} p USING byrd.steps s
                WHERE s.run_id = %(run)s AND s.no = ANY(%(called)s) AND s.status = 'succeeded' AND p.step_id = s.id""",
            called,
        )
    reopen(conn, run_id, "status = 'succeeded' AND no = ANY(%(called)s)", called)
    return numbers


def reopen(conn: Connection, run_id: str, which: str, params: Mapping[str, Any] | None = None) -> list[int]:
    """failed, skipped, cancelled or succeeded → pending for those of a run's steps; return their numbers."""
    rows = query(
        conn,
        f"""UPDATE byrd.steps SET status = 'pending', finished_at = NULL, result = NULL, error = NULL, cause = NULL,
                   retries = 0, preemptions = 0, started_at = NULL, run_at = NULL, wake_at = NULL, ready_at = NULL,
                   limit_no = NULL, expires_at = nullif(expires_at, {flow.REVOKED})
            WHERE run_id = %(run)s AND {which} RETURNING no""",
        {"run": run_id, **(params or {})},
    )
    return [row.no for row in rows]


def _hold(conn: Connection, run_id: str) -> None:
    """Take the ready steps of a paused run out of the relay's sight, so that it costs it nothing."""
    query(
        conn, "UPDATE byrd.steps SET wake_at = 'infinity' WHERE run_id = %(run)s AND status = 'ready'", {"run": run_id}
    )


def _wake(conn: Connection, run_id: str) -> list[Wakeup]:
    rows = query(
        conn,
        f"""UPDATE byrd.steps s SET wake_at = greatest(s.run_at, {_NOW} + {flow.RESEND_SECONDS} * interval '1 second'),
                   sends = CASE WHEN s.run_at <= {_NOW} THEN 1 ELSE 0 END
            WHERE s.run_id = %(run)s AND s.status = 'ready' RETURNING {WAKEUP}""",
        {"run": run_id},
    )
    wakeups = wakeups_of(rows)
    waits = query(
        conn,
        f"""UPDATE byrd.steps s SET wake_at = CASE s.kind WHEN 'saga' THEN {_NOW} ELSE {flow.LOOK_AT} END
            WHERE s.run_id = %(run)s AND s.status = 'waiting'""",
        {"run": run_id},
    )
    limited = query(
        conn,
        """UPDATE byrd.limit_keys k SET next_at = now() FROM
             (SELECT DISTINCT s.limit_name, s.limit_key FROM byrd.steps s
               WHERE s.run_id = %(run)s AND s.status = 'ready' AND s.limit_no IS NOT NULL AND s.limit_slot IS NULL) s
            WHERE k.name = s.limit_name AND k.key = s.limit_key""",
        {"run": run_id},
    )
    if waits.rowcount or limited.rowcount:
        query(conn, f"NOTIFY {CHANNEL}")
    return wakeups


def _has_failed(conn: Connection, run_id: str) -> bool:
    sql = """SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND kind IN ('task','join','wait','saga','callback')
             AND status IN ('failed','skipped','cancelled') LIMIT 1"""
    return query(conn, sql, {"run": run_id}).first() is not None


def _compensate(conn: Connection, run_id: str, name: str, outcome: str, why: Mapping[str, Any]) -> list[Wakeup]:
    """→ compensating: plan one compensation for each saga step that was completed, or may have been."""
    query(
        conn,
        """UPDATE byrd.runs SET status = 'compensating', outcome = %(outcome)s
           WHERE id = %(run)s AND status = ANY(%(sources)s)""",
        {"run": run_id, "outcome": outcome, "sources": _sources(name)},
    )
    planned = undo.plan(conn, run_id)
    record(conn, run_id, "rollback_started", {"steps": planned, "then": outcome, **why})
    return undo.release_next(conn, run_id, None)[0]


def _asked(conn: Connection, run_id: str, event: str) -> dict[str, Any]:
    """Return who asked for something, and why, as far as its event says."""
    detail = query(
        conn,
        "SELECT detail FROM byrd.events WHERE run_id = %(run)s AND event = %(event)s ORDER BY id DESC LIMIT 1",
        {"run": run_id, "event": event},
    ).scalar()
    return {key: value for key, value in json.loads(detail or "{}").items() if key in ("by", "reason")}


def _nothing_to_undo(run_id: str, why: str) -> IllegalTransitionError:
    return IllegalTransitionError(f"run {run_id} has nothing to undo: no step with a compensation {why}")


def _past_pivot(run_id: str, pivot: int) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"run {run_id} goes forward only: step {pivot}, its pivot, has succeeded, so nothing is rolled back; "
        f"`byrd retry` tries again what failed"
    )


def _finish(conn: Connection, run_id: str, name: str, outcome: str) -> None:
    query(
        conn,
        f"""UPDATE byrd.steps SET status = 'skipped', finished_at = {_NOW}
            WHERE run_id = %(run)s AND status = 'pending'""",
        {"run": run_id},
    )
    ended = query(
        conn,
        f"""UPDATE byrd.runs r SET status = %(outcome)s, finished_at = {_NOW}, error = coalesce(r.error, CASE
              WHEN %(outcome)s <> 'succeeded' THEN (SELECT coalesce(o.error, c.error, f.error) FROM byrd.steps o
                LEFT JOIN byrd.steps c ON c.run_id = o.run_id AND c.no = o.cause
                LEFT JOIN LATERAL (SELECT error FROM byrd.steps x WHERE x.run_id = o.run_id AND x.error IS NOT NULL
                                   AND x.status IN ('failed','cancelled') AND x.kind NOT IN ('errback','item')
                                   ORDER BY x.status <> 'failed', x.finished_at LIMIT 1) f ON true
                WHERE o.run_id = r.id AND o.no = r.output) END)
            WHERE r.id = %(run)s AND r.status = ANY(%(sources)s) RETURNING r.parent_step""",
        {"run": run_id, "outcome": outcome, "sources": _sources(name)},
    ).first()
    record(conn, run_id, outcome)
    if ended is not None and ended.parent_step is not None:
        query(conn, f"NOTIFY {CHANNEL}")  # the relay tells that step


def _by(name: str | None) -> dict[str, str]:
    """The detail of a command's event: who gave the command, where that is known."""
    return {"by": name} if name else {}


def done_before(conn: Connection, run_id: str, token: str | None) -> bool:
    """Tell whether the command with this token was committed before, and only its answer lost."""
    if token is None:
        return False
    locks.own_run(conn, run_id)  # its first execution may be committing still
    found = query(
        conn,
        "SELECT 1 FROM byrd.events WHERE run_id = %(run)s AND token = %(token)s",
        {"run": run_id, "token": token},
    ).first()
    return found is not None


def locked(conn: Connection, run_id: str) -> Any:
    """Have the run to oneself; return its row, locked."""
    locks.own_run(conn, run_id)
    sql = "SELECT id, status, pivot FROM byrd.runs WHERE id = %(run)s FOR NO KEY UPDATE"
    row = query(conn, sql, {"run": run_id}).first()
    if row is None:
        raise RunNotFoundError(f"no run has the id {run_id}")
    return row


def _move(conn: Connection, run_id: str, name: str, target: str) -> None:
    """The guarded UPDATE of a transition that an operator asks for; raises when the status does not allow it."""
    run = locked(conn, run_id)
    row = query(
        conn,
        "UPDATE byrd.runs SET status = %(target)s WHERE id = %(run)s AND status = ANY(%(sources)s) RETURNING id",
        {"run": run_id, "target": target, "sources": _sources(name)},
    ).first()
    if row is None:
        raise _illegal(run_id, run.status, name)


def _sources(name: str) -> list[str]:
    return [str(status) for status in sources(RUN_TRANSITIONS, name)]


def _illegal(run_id: str, status: str, name: str) -> IllegalTransitionError:
    allowed = ", ".join(sorted(str(s) for s in sources(RUN_TRANSITIONS, name)))
    return IllegalTransitionError(f"run {run_id} is {status}: {name.partition('_')[0]} needs it to be {allowed}")
