"""Sagas that have failed, and what an operator does about a compensation that did.

A saga that has failed is *waiting*, and whoever looks at it has its run to itself: it cancels what has not started
there, waits for what runs to end, has the compensations written, and lets the saga fail once these are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection

from byrd.errors import IllegalTransitionError
from byrd.model import STEP_TRANSITIONS as TRANSITIONS
from byrd.model import RunStatus, StepKind, StepStatus, sources
from byrd.store import flow, runs, steps, undo
from byrd.store.flow import error_json
from byrd.store.locks import SHARE_RUN_OF_STEP
from byrd.store.rows import Wakeup, query

_NOW = "clock_timestamp()"
#: A saga that waits for what runs in it is looked at when that ends, and this often besides.
_LOOK_AGAIN_SECONDS = 5.0
_STOPPED = error_json("TaskRevokedError", "celery.exceptions", ["its saga has failed"])
#: In a run with one of these statuses a saga that has failed goes on; in others, once it is one of these again.
_MOVING = (RunStatus.RUNNING, RunStatus.CANCELLING)


# -- the end of a saga -----------------------------------------------------------------------------


def settle_due(conn: Connection, run_ids: Sequence[str]) -> list[Wakeup]:
    """Look at the sagas of these runs that are to be looked at; the caller has the runs to itself."""
    wakeups: list[Wakeup] = []
    while True:
        # The innermost first: a saga waits for those inside it.
        row = query(
            conn,
            f"""SELECT s.run_id::text AS run_id, s.no, s.join_no, s.cause, r.status, r.pivot FROM byrd.steps s
                  JOIN byrd.runs r ON r.id = s.run_id
                 WHERE s.run_id = ANY(%(runs)s::uuid[]) AND s.kind = 'saga' AND s.status = 'waiting'
                   AND s.wake_at <= {_NOW} ORDER BY s.run_id, s.no DESC LIMIT 1""",
            {"runs": list(run_ids)},
        ).first()
        if row is None:
            return wakeups
        if row.status not in _MOVING:
            _look_again(conn, row, None)
            continue
        wakeups += _settle(conn, row)


def _settle(conn: Connection, row: Any) -> list[Wakeup]:
    """Do the next thing for one saga that has failed; it is due no longer after that."""
    params = {"run": row.run_id, "saga": row.no}
    _cancel_rest(conn, row)
    busy = f"""{undo.INSIDE} SELECT 1 FROM byrd.steps s JOIN inside i ON i.no = s.no
                WHERE s.run_id = %(run)s AND s.status IN ('running','waiting') LIMIT 1"""
    if query(conn, busy, params).first():
        _look_again(conn, row, _LOOK_AGAIN_SECONDS)
        return []
    planned = "SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND compensates IS NOT NULL AND saga = %(saga)s LIMIT 1"
    begun = query(conn, planned, params).first() is not None
    cause = None if row.pivot is not None and not begun else undo.cause_of(conn, row.run_id, row.no)
    if cause is not None and not begun:
        number = undo.plan(conn, row.run_id, row.no)
        if number:
            runs.record(conn, row.run_id, "rollback_started", {"steps": number, "cause": cause}, step_no=row.no)
        begun = number > 0
    if begun:
        wakeups, done = undo.release_next(conn, row.run_id, row.no)
        if not done:
            _look_again(conn, row, None)
            return wakeups
    return _end(conn, row, retriable=cause is None)


def _cancel_rest(conn: Connection, row: Any) -> None:
    """pending, ready, waiting → cancelled for what has not started in a saga; nobody calls errbacks of these."""
    params = {"run": row.run_id, "saga": row.no, "cause": row.cause, "error": _STOPPED}
    rows = query(
        conn,
        f"""{undo.INSIDE} UPDATE byrd.steps s SET status = 'cancelled', finished_at = {_NOW}, limit_slot = NULL,
                   error = %(error)s, cause = %(cause)s FROM inside i
             WHERE s.run_id = %(run)s AND s.no = i.no AND s.status IN ('pending','ready','waiting')
               AND NOT (s.kind = 'saga' AND s.status = 'waiting') RETURNING s.no""",
        params,
    )
    for no in sorted(found.no for found in rows):
        flow.skip_errbacks(conn, row.run_id, no)


def _end(conn: Connection, row: Any, *, retriable: bool) -> list[Wakeup]:
    """waiting → failed, with the error of the step that failed; ``retriable``: what is around it is not rolled back."""
    done = query(
        conn,
        f"""UPDATE byrd.steps g SET status = 'failed', finished_at = {_NOW},
                   mark = CASE WHEN %(retriable)s THEN 'retriable' END,
                   error = (SELECT coalesce(x.error, c.error, %(stopped)s) FROM byrd.steps x
                     LEFT JOIN byrd.steps c ON c.run_id = x.run_id AND c.no = x.cause
                    WHERE x.run_id = g.run_id AND x.no = g.cause)
             WHERE g.run_id = %(run)s AND g.no = %(saga)s AND g.status = 'waiting' RETURNING g.no, g.join_no""",
        {"run": row.run_id, "saga": row.no, "retriable": retriable, "stopped": _STOPPED},
    ).one()
    wakeups = runs.advance(conn, row.run_id, done.no, done.join_no, succeeded=False)
    flow.look_at_sagas(conn, row.run_id)
    return wakeups


def _look_again(conn: Connection, row: Any, seconds: float | None) -> None:
    """Have a saga looked at later; without a time, once somebody says so."""
    query(
        conn,
        f"""UPDATE byrd.steps SET wake_at = coalesce({_NOW} + %(seconds)s * interval '1 second', 'infinity')
            WHERE run_id = %(run)s AND no = %(saga)s AND status = 'waiting'""",
        {"run": row.run_id, "saga": row.no, "seconds": seconds},
    )


# -- a pivot beside what has failed ----------------------------------------------------------------


def not_started(conn: Connection, step_id: str) -> list[Wakeup]:
    """ready → cancelled for a step that nobody could claim, if it never will start: it is too late, or in vain."""
    return steps.expire(conn, step_id) or stop_pivot(conn, step_id)


def stop_pivot(conn: Connection, step_id: str) -> list[Wakeup]:
    """ready → cancelled for a pivot that has not started when another step of its run has failed for good.

    Its success would forbid the rollback.  It has that step's error, and nobody calls its errbacks.
    """
    stops = f"s.id = %(id)s AND s.status = 'ready' AND r.status = 'running' AND {undo.POINTLESS}"
    found = query(
        conn,
        f"SELECT s.run_id::text FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id WHERE {stops}",
        {"id": step_id},
    ).first()
    if found is None:
        return []
    query(conn, f"SELECT 1 FROM {SHARE_RUN_OF_STEP}", {"id": step_id})
    row = query(
        conn,
        f"""UPDATE byrd.steps s SET status = 'cancelled', finished_at = {_NOW}, limit_slot = NULL, cause = x.no,
                   error = x.error
              FROM byrd.runs r, byrd.steps x
             WHERE {stops} AND r.id = s.run_id AND x.run_id = s.run_id AND x.no = %(cause)s
            RETURNING s.no, s.join_no, s.cause""",
        {"id": step_id, "cause": undo.cause_of(conn, found.run_id)},
    ).first()
    if row is None:
        return []
    runs.record(conn, found.run_id, "pivot_stopped", {"cause": row.cause}, step_no=row.no)
    flow.skip_errbacks(conn, found.run_id, row.no)
    wakeups = runs.advance(conn, found.run_id, row.no, row.join_no, succeeded=False)
    flow.look_at_sagas(conn, found.run_id)
    return wakeups


# -- what an operator does about a compensation ----------------------------------------------------


def skip(
    conn: Connection, run_id: str, no: int, *, reason: str, by: str | None = None, token: str | None = None
) -> list[Wakeup]:
    """ready, failed or cancelled → skipped for a compensation: what it should undo stays as it is."""
    return _settle_by_hand(
        conn, run_id, no, "skip_undo", event="compensation_skipped", detail={"reason": reason}, by=by, token=token
    )


def done_by_hand(
    conn: Connection, run_id: str, no: int, *, note: str, by: str | None = None, token: str | None = None
) -> list[Wakeup]:
    """ready, failed or cancelled → succeeded for a compensation: somebody has done what it should."""
    return _settle_by_hand(
        conn, run_id, no, "done_by_hand", event="done_by_hand", detail={"note": note}, by=by, token=token
    )


def _settle_by_hand(
    conn: Connection,
    run_id: str,
    no: int,
    name: str,
    *,
    event: str,
    detail: dict[str, str],
    by: str | None,
    token: str | None,
) -> list[Wakeup]:
    if runs.done_before(conn, run_id, token):
        return []
    run = runs.locked(conn, run_id)
    allowed = [str(status) for status in sources(TRANSITIONS, name)]
    step = query(
        conn,
        "SELECT id, kind, status, saga FROM byrd.steps WHERE run_id = %(run)s AND no = %(no)s FOR NO KEY UPDATE",
        {"run": run_id, "no": no},
    ).first()
    _check_undo(conn, run_id, no, step, allowed)
    target = "skipped" if name == "skip_undo" else "succeeded"
    query(
        conn,
        f"""UPDATE byrd.steps SET status = %(target)s, finished_at = {_NOW}, limit_slot = NULL,
                   result = CASE %(target)s WHEN 'succeeded' THEN 'null' END,
                   error = CASE %(target)s WHEN 'skipped' THEN error END
            WHERE run_id = %(run)s AND no = %(no)s AND status = ANY(%(allowed)s)""",
        {"run": run_id, "no": no, "target": target, "allowed": allowed},
    )
    runs.record(conn, run_id, event, {**detail, **({"by": by} if by else {})}, step_no=no, token=token)
    if run.status == RunStatus.ROLLBACK_STUCK:
        return runs.unstick(conn, run_id)
    return runs.go_on_undoing(conn, run_id, step.saga if step is not None else None)


def _check_undo(conn: Connection, run_id: str, no: int, step: Any, allowed: Sequence[str]) -> None:
    """Raise :class:`IllegalTransitionError` unless the step is a compensation that somebody may settle."""
    if step is None:
        raise IllegalTransitionError(f"run {run_id} has no step {no}; `byrd show {run_id[:8]}` draws its steps")
    if step.kind != StepKind.COMPENSATION:
        undone_by = query(
            conn,
            "SELECT no FROM byrd.steps WHERE run_id = %(run)s AND compensates = %(no)s",
            {"run": run_id, "no": no},
        ).scalar()
        hint = f"; it is undone by step {undone_by}" if undone_by is not None else ""
        raise IllegalTransitionError(f"step {no} of run {run_id} is no compensation{hint}")
    if step.status not in allowed:
        hint = ""
        if step.status == StepStatus.RUNNING:
            hint = f"; break it off first, with app.control.revoke({step.id!r}, terminate=True)"
        raise IllegalTransitionError(
            f"step {no} of run {run_id} is {step.status}: only a compensation that is {', '.join(sorted(allowed))} "
            f"may be skipped, or done by hand{hint}"
        )
