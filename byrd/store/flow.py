"""What follows from a step's outcome within its plan: successors made ready or skipped, joins finished."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection

from byrd.model import StepKind
from byrd.store.rows import CHANNEL, WAKEUP, Wakeup, query, wakeups_of

#: A ready step whose message was just published is looked at again by the relay after this time.
RESEND_SECONDS = 2.0
#: In runs with another status nothing that is ready is sent.  In one that is cancelling, compensations of a saga that
#: had failed before are all that is ready.
MOVING = "('running','compensating','cancelling')"

_NOW = "clock_timestamp()"

#: When the step ``s`` was completed: after what it waited for, though the clock may have been set back since then, for
#: compensations go by the order of completion.
COMPLETED_AT = f"""greatest({_NOW}, (SELECT p.finished_at + interval '1 microsecond' FROM byrd.steps p
    WHERE p.run_id = s.run_id AND p.no = s.after))"""

#: The time to start by of a step that was revoked before it was ready: it will find that it is too late.
REVOKED = "'epoch'::timestamptz"

_DUE = f"coalesce(s.eta <= {_NOW}, coalesce(s.countdown, 0) <= 0)"
# A step that is due is published by whoever commits this, so the relay looks again later; one that is not, at its time.
_SET_RELEASED = f"""
UPDATE byrd.steps s
   SET status = CASE WHEN s.kind = 'wait' THEN 'waiting' ELSE 'ready' END, ready_at = {_NOW},
       run_at = coalesce(s.eta, {_NOW} + coalesce(s.countdown, 0) * interval '1 second'),
       wake_at = CASE WHEN {_DUE} THEN {_NOW} + {RESEND_SECONDS} * interval '1 second'
                      ELSE coalesce(s.eta, {_NOW} + s.countdown * interval '1 second') END,
       sends = CASE WHEN {_DUE} THEN 1 ELSE 0 END,
       expires_at = coalesce({_NOW} + s.expires_in * interval '1 second', s.expires_at)
"""
_RELEASABLE = "s.status = 'pending' AND s.kind NOT IN ('join','saga') AND NOT s.replaced"
_RELEASE = f"{_SET_RELEASED} WHERE s.run_id = %(run)s AND {_RELEASABLE}"
_RELEASE_AFTER = f"{_RELEASE} AND s.after = %(no)s AND s.on_failure = %(failed)s RETURNING {WAKEUP}"
_RELEASE_AFTER_ALL = f"""{_SET_RELEASED}
  FROM unnest(%(runs)s::uuid[], %(numbers)s::int[]) AS done (run_id, no)
 WHERE s.run_id = done.run_id AND s.after = done.no AND NOT s.on_failure AND {_RELEASABLE}
RETURNING {WAKEUP}, s.after"""
_RELEASE_ROOTS = f"{_RELEASE} AND s.no = ANY(%(numbers)s) RETURNING {WAKEUP}"


def release(conn: Connection, run_id: str, numbers: Iterable[int]) -> list[Wakeup]:
    """pending → ready, waits → waiting, for the steps whose predecessors are known to be done."""
    found = wakeups_of(query(conn, _RELEASE_ROOTS, {"run": run_id, "numbers": list(numbers)}))
    begin_waits(conn, found)
    return [step for step in found if step.kind != StepKind.WAIT]


#: When somebody should look at the wait ``s``: at once when its signal was kept for it, or it was revoked before.
LOOK_AT = f"""CASE WHEN s.expires_at <= s.ready_at OR s.signal IS NOT NULL AND EXISTS
      (SELECT 1 FROM byrd.signals g WHERE g.run_id = s.run_id AND g.name = s.signal AND g.delivered_at IS NULL)
    THEN {_NOW} ELSE coalesce(s.run_at, 'infinity'::timestamptz) END"""


def begin_waits(conn: Connection, released: Iterable[Wakeup]) -> bool:
    """Have those of the steps that are waits, and have just begun, looked at in their time; tell whether there are any.

    One that waits for a signal only has no time: its ``run_at`` is NULL.  None ends in this transaction, which does not
    have the run to itself; the relay is told of those that can end already.
    """
    waits = [step.id for step in released if step.kind == StepKind.WAIT]
    if not waits:
        return False
    query(
        conn,
        """UPDATE byrd.steps SET sends = 0, started_at = ready_at,
                  run_at = CASE WHEN eta IS NULL THEN ready_at + countdown * interval '1 second' ELSE eta END
            WHERE id = ANY(%(waits)s)""",
        {"waits": waits},
    )
    rows = query(
        conn,
        f"""UPDATE byrd.steps s SET wake_at = {LOOK_AT} WHERE id = ANY(%(waits)s)
            RETURNING s.wake_at <= {_NOW} AS due""",
        {"waits": waits},
    )
    if any(row.due for row in rows):
        query(conn, f"NOTIFY {CHANNEL}")
    return True


def release_after(conn: Connection, done: Sequence[tuple[str, int]]) -> tuple[list[Wakeup], set[tuple[str, int]]]:
    """pending → ready, waits → waiting, for what comes right after the success of steps of many runs.

    Returns what became ready, and those of the steps that :func:`advance` has nothing to add to.
    """
    params = {"runs": [run_id for run_id, _ in done], "numbers": [no for _, no in done]}
    rows = query(conn, _RELEASE_AFTER_ALL, params).all()
    released = wakeups_of(rows)
    begin_waits(conn, released)
    empty_groups = query(
        conn,
        """SELECT s.run_id::text, s.after FROM unnest(%(runs)s::uuid[], %(numbers)s::int[]) AS done (run_id, no)
             JOIN byrd.steps s ON s.run_id = done.run_id AND s.after = done.no
            WHERE s.kind = 'join' AND s.waiting = 0 AND s.status = 'pending' AND NOT s.on_failure""",
        params,
    )
    settled = {(str(row.run_id), row.after) for row in rows} - {(row.run_id, row.after) for row in empty_groups}
    return [step for step in released if step.kind != StepKind.WAIT], settled


def advance(
    conn: Connection, run_id: str, no: int, join_no: int | None, *, succeeded: bool
) -> tuple[list[Wakeup], bool]:
    """Do all that follows from the outcome of step ``no`` within the plan.

    Returns the steps that became ready, and whether a join still waits for others, a wait has begun, or a saga has
    failed: if none of these, the run may be over.
    """
    wakeups: list[Wakeup] = []
    failed: list[int] = []
    still_waiting = False
    done = deque([(no, join_no, succeeded)])
    while done:
        current, into, good = done.popleft()
        arrived: Counter[int] = Counter([into] if into is not None else [])
        released = wakeups_of(query(conn, _RELEASE_AFTER, {"run": run_id, "no": current, "failed": not good}))
        still_waiting |= begin_waits(conn, released)
        wakeups += [step for step in released if step.kind != StepKind.WAIT]
        done.extend((n, j, True) for n, j in _finish_empty_joins(conn, run_id, current, failed=not good))
        if not good:
            failed.append(current)
            arrived.update(_skip_after(conn, run_id, current))
        for join, count in sorted(arrived.items()):
            left = _arrive(conn, run_id, join, count)
            if left is None:
                continue  # the join was cancelled with its run, so this may be the run's last step
            if left.waiting > 0:
                still_waiting = True
                continue
            if left.kind == "saga" and _fail_saga(conn, run_id, join):
                still_waiting = True
                continue
            is_join = left.kind == "join"
            ok, next_join = finish_join(conn, run_id, join, is_join=is_join)
            done.append((join, next_join, ok))
            if not ok and is_join:
                done.extend((n, j, False) for n, j in _fail_bodies(conn, run_id, join))
    if failed and _fail_sagas_of(conn, run_id, failed):
        still_waiting = True
    return wakeups, still_waiting


def _fail_saga(conn: Connection, run_id: str, no: int) -> bool:
    """pending → waiting for a saga whose canvas has failed; tell whether it has.

    What follows is for :mod:`byrd.store.sagas`, which has the run to itself.
    """
    rows = query(
        conn,
        f"""UPDATE byrd.steps g SET status = 'waiting', ready_at = {_NOW}, wake_at = {_NOW},
                  cause = CASE WHEN m.status = 'skipped' THEN m.cause ELSE m.no END
              FROM byrd.steps m
             WHERE g.run_id = %(run)s AND g.no = %(no)s AND g.status = 'pending' AND m.run_id = g.run_id
               AND m.join_no = g.no AND m.status <> 'succeeded' RETURNING g.no""",
        {"run": run_id, "no": no},
    ).all()
    if rows:
        query(conn, f"NOTIFY {CHANNEL}")
    return bool(rows)


def _fail_sagas_of(conn: Connection, run_id: str, failed: Sequence[int]) -> bool:
    """pending → waiting for the sagas of steps that have failed: whatever else runs there, it cannot succeed any more.

    Not of those that failed because of others, or are retriable; nor once the run goes forward only.
    """
    rows = query(
        conn,
        f"""UPDATE byrd.steps g SET status = 'waiting', ready_at = {_NOW}, wake_at = {_NOW}, cause = x.no
              FROM byrd.steps x, byrd.runs r
             WHERE x.run_id = %(run)s AND x.no = ANY(%(failed)s) AND x.kind IN ('task','wait','callback','saga')
               AND (x.cause IS NULL OR x.kind = 'saga') AND x.mark IS DISTINCT FROM 'retriable'
               AND r.id = x.run_id AND r.pivot IS NULL
               AND g.run_id = x.run_id AND g.no = x.saga AND g.status = 'pending' RETURNING g.no""",
        {"run": run_id, "failed": list(failed)},
    ).all()
    if rows:
        query(conn, f"NOTIFY {CHANNEL}")
    return bool(rows)


def look_at_sagas(conn: Connection, run_id: str) -> None:
    """Have the sagas of a run that have failed looked at: a step has ended for which one of them may have waited."""
    rows = query(
        conn,
        f"""UPDATE byrd.steps SET wake_at = {_NOW} WHERE id IN
             (SELECT id FROM byrd.steps WHERE run_id = %(run)s AND kind = 'saga' AND status = 'waiting'
                 AND wake_at > {_NOW} ORDER BY no DESC FOR NO KEY UPDATE) RETURNING 1""",
        {"run": run_id},
    ).all()
    if rows:
        query(conn, f"NOTIFY {CHANNEL}")


def _finish_empty_joins(conn: Connection, run_id: str, no: int, *, failed: bool) -> list[tuple[int, int | None]]:
    """pending → succeeded for the empty groups after step ``no``: there is nothing that they wait for."""
    rows = query(
        conn,
        f"""UPDATE byrd.steps s SET status = 'succeeded', result = '[]', finished_at = {COMPLETED_AT}
            WHERE run_id = %(run)s AND after = %(no)s AND on_failure = %(failed)s AND kind = 'join' AND waiting = 0
              AND status = 'pending' RETURNING no, join_no""",
        {"run": run_id, "no": no, "failed": failed},
    )
    return [(row.no, row.join_no) for row in rows]


def skip_errbacks(conn: Connection, run_id: str, no: int) -> None:
    """pending → skipped for the errbacks of step ``no`` and all that comes after them: nobody will call them."""
    _skip(conn, run_id, no, errbacks=True)


def _skip_after(conn: Connection, run_id: str, no: int) -> Counter[int]:
    """pending → skipped for all that waited for the success of step ``no``; count what joins lose by it."""
    return _skip(conn, run_id, no, errbacks=False)


def _skip(conn: Connection, run_id: str, no: int, *, errbacks: bool) -> Counter[int]:
    rows = query(
        conn,
        f"""WITH RECURSIVE down AS (
              SELECT no FROM byrd.steps
               WHERE run_id = %(run)s AND after = %(no)s AND on_failure = %(errbacks)s AND status = 'pending'
              UNION
              SELECT s.no FROM byrd.steps s JOIN down d ON s.after = d.no
               WHERE s.run_id = %(run)s AND s.status = 'pending')
            UPDATE byrd.steps s SET status = 'skipped', cause = %(no)s, finished_at = {_NOW}
              FROM down WHERE s.run_id = %(run)s AND s.no = down.no AND s.status = 'pending'
            RETURNING s.no, s.join_no""",
        {"run": run_id, "no": no, "errbacks": errbacks},
    ).all()
    skipped = {row.no for row in rows}
    return Counter(row.join_no for row in rows if row.join_no is not None and row.join_no not in skipped)


def _arrive(conn: Connection, run_id: str, join: int, count: int) -> Any:
    """Count members that are done; return how many the join still waits for, or None when it is over."""
    return query(
        conn,
        """UPDATE byrd.steps SET waiting = waiting - %(count)s
           WHERE run_id = %(run)s AND no = %(join)s AND status = 'pending' RETURNING waiting, kind""",
        {"run": run_id, "join": join, "count": count},
    ).first()


def finish_join(conn: Connection, run_id: str, join: int, *, is_join: bool) -> tuple[bool, int | None]:
    """pending → succeeded with its members' values in order, or → failed with the first failed member's error.

    Returns whether it succeeded, and the join that it is itself a member of.
    """
    params: dict[str, Any] = {"run": run_id, "join": join}
    bad = query(
        conn,
        """SELECT m.no, coalesce(m.error, c.error) AS error FROM byrd.steps m
           LEFT JOIN byrd.steps c ON c.run_id = m.run_id AND c.no = m.cause
           WHERE m.run_id = %(run)s AND m.join_no = %(join)s AND m.status <> 'succeeded'
           ORDER BY m.join_pos LIMIT 1""",
        params,
    ).first()
    if bad is None:
        value = (
            "'[' || coalesce(string_agg(m.result, ',' ORDER BY m.join_pos), '') || ']'" if is_join else "max(m.result)"
        )
        done = query(
            conn,
            f"""UPDATE byrd.steps s SET status = 'succeeded', (finished_at, result) =
                  (SELECT greatest({COMPLETED_AT}, max(m.finished_at)), {value} FROM byrd.steps m
                    WHERE m.run_id = %(run)s AND m.join_no = %(join)s)
                WHERE run_id = %(run)s AND no = %(join)s AND status = 'pending' RETURNING join_no""",
            params,
        ).one()
        return True, done.join_no
    done = query(
        conn,
        f"""UPDATE byrd.steps SET status = 'failed', finished_at = {_NOW}, error = %(error)s, cause = %(cause)s
            WHERE run_id = %(run)s AND no = %(join)s AND status = 'pending' RETURNING join_no""",
        {**params, "error": bad.error, "cause": bad.no},
    ).one()
    return False, done.join_no


def _fail_bodies(conn: Connection, run_id: str, join: int) -> list[tuple[int, int | None]]:
    """pending → failed for what follows a group one of whose members failed.

    A body that is one canvas gets a ChordError; the members of a body that is a group, the member's own error: so does
    Celery, and tells errbacks.
    """
    member = query(
        conn,
        """SELECT m.id, j.error, EXISTS (SELECT 1 FROM byrd.steps b WHERE b.run_id = j.run_id AND b.after = j.no
                                          AND b.kind = 'join' AND b.waiting > 0) AS body_is_group
           FROM byrd.steps j JOIN byrd.steps m ON m.run_id = j.run_id AND m.no = j.cause
           WHERE j.run_id = %(run)s AND j.no = %(join)s""",
        {"run": run_id, "join": join},
    ).one()
    text = f"Dependency {member.id} raised {_repr_of(member.error)}"
    error = member.error if member.body_is_group else error_json("ChordError", "celery.exceptions", [text])
    rows = query(
        conn,
        f"""UPDATE byrd.steps SET status = 'failed', error = %(error)s, cause = %(join)s, finished_at = {_NOW}
            WHERE run_id = %(run)s AND after = %(join)s AND NOT on_failure AND status = 'pending'
              AND (kind <> 'join' OR waiting = 0)
            RETURNING no, join_no""",
        {"run": run_id, "join": join, "error": error},
    )
    return [(row.no, row.join_no) for row in rows]


def error_json(exc_type: str, module: str, args: list[str]) -> str:
    """Return an exception in the JSON form of Celery's result backends."""
    return json.dumps({"exc_type": exc_type, "exc_module": module, "exc_message": args})


def _repr_of(error: str | None) -> str:
    """Return what ``repr()`` of the recorded exception would print."""
    if error is None:
        return "an unknown error"
    found = json.loads(error)
    args = found.get("exc_message") or []
    inner = ", ".join(repr(arg) for arg in args) if isinstance(args, list | tuple) else repr(args)
    return f"{found.get('exc_type')}({inner})"
