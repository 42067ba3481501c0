"""Waits: steps that a time or a signal ends, and the signals themselves.

Whoever ends waits has their run to itself.  So a signal and the waits that begin meanwhile see one another: whichever
comes second finds the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import Connection

from byrd.errors import IllegalTransitionError, StaleAttempt
from byrd.model import RunStatus, StepStatus
from byrd.store import flow, locks, progress, runs, sagas, steps
from byrd.store.flow import COMPLETED_AT, REVOKED, error_json
from byrd.store.rows import CHANNEL, Wakeup, query

#: How many waits, and of how many runs, one transaction ends, so that none takes long; what is left is due at once.
BATCH = 200

_NOW = "clock_timestamp()"
#: In the place of no time-out, until the row says infinity.
_LONG_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Awaited:
    """A step that waits for a signal: since when, until when, and its value (JSON) then; without one it fails.

    ``of``: who is to send it; None when the wait does not say.
    """

    run_id: str
    workflow: str | None
    title: str
    run_status: str
    step_no: int
    signal: str
    of: str | None
    since: datetime
    until: datetime | None
    default: str | None


class Taken(NamedTuple):
    """What a running step has of a signal: its payload (JSON), or whether it is too late for it."""

    payload: str | None
    late: bool


# -- transitions -----------------------------------------------------------------------------------


def signal(
    conn: Connection, run_id: str, name: str, payload: str, *, by: str | None = None, token: str | None = None
) -> list[Wakeup]:
    """Record a signal with its payload (JSON); waiting → succeeded for the first step that waits for it, if one does.

    Raises :class:`IllegalTransitionError` for a run that has ended.  In one that is rolled back compensations may wait.
    """
    if runs.done_before(conn, run_id, token):
        return []
    run = runs.locked(conn, run_id)
    if RunStatus(run.status).final:
        raise IllegalTransitionError(f"run {run_id} is {run.status}: a signal needs a run that has not ended")
    query(
        conn,
        "SELECT byrd.signal(%(run)s::uuid, %(name)s, %(payload)s, %(by)s, %(token)s::uuid)",
        {"run": run_id, "name": name, "payload": payload, "by": by, "token": token},
    )
    return _end(conn, [run_id])


def end_due(conn: Connection, *, limit: int = BATCH) -> tuple[list[Wakeup], list[str], bool]:
    """waiting → succeeded or failed for waits whose time or signal has come; and see to the sagas that have failed.

    Returns the steps to publish, the runs that somebody else was moving just then (:func:`end_due_of` waits for these),
    and whether there may be more.
    """
    due = "SELECT 1 FROM byrd.steps WHERE status = 'waiting' AND wake_at <= now() LIMIT 1"
    if query(conn, due).first() is None or not locks.alone(conn, locks.WAITS):
        return [], [], False
    rows = query(
        conn,
        f"""WITH due AS MATERIALIZED (
              SELECT run_id FROM byrd.steps WHERE status = 'waiting' AND wake_at <= now()
               ORDER BY wake_at LIMIT %(limit)s),
            w AS MATERIALIZED (SELECT run_id, count(*) AS waits FROM due GROUP BY run_id)
            SELECT w.run_id::text, w.waits, {locks.TRY_OWN_RUN} AS mine FROM w""",
        {"limit": limit},
    ).all()
    mine = [row.run_id for row in rows if row.mine]
    wakeups = _end(conn, mine) if mine else []
    return wakeups, [row.run_id for row in rows if not row.mine], sum(row.waits for row in rows) >= limit


def end_due_of(conn: Connection, run_id: str) -> list[Wakeup]:
    """Do the same for one run, once nobody else moves it."""
    locks.own_run(conn, run_id)
    return _end(conn, [run_id])


def _end(conn: Connection, run_ids: Sequence[str]) -> list[Wakeup]:
    """End what has its signal, then what has its time; do all that follows."""
    params = {"runs": list(run_ids)}
    ended = [*query(conn, _DELIVER, params), *query(conn, _END_BY_TIME, params)]
    # What is still there was woken by a signal that another has, or its run is paused: then time ends it later.
    query(conn, _LOOK_LATER, params)
    # A thousand sleeps that end together have mostly one step each after them.
    plain = [_place(row) for row in ended if row.status == StepStatus.SUCCEEDED and row.join_no is None]
    wakeups, settled = flow.release_after(conn, plain) if plain else ([], set())
    rest = sorted((row for row in ended if _place(row) not in settled), key=_place)
    for run_id, rows in groupby(rest, key=lambda row: str(row.run_id)):
        wakeups += _follow(conn, run_id, rows)
    return wakeups + sagas.settle_due(conn, run_ids)


def _follow(conn: Connection, run_id: str, rows: Iterable[Any]) -> list[Wakeup]:
    """Do what follows from the ends of these waits of one run."""
    wakeups: list[Wakeup] = []
    waiting = False
    for row in rows:
        succeeded = row.status == StepStatus.SUCCEEDED
        ready, more = flow.advance(conn, run_id, row.no, row.join_no, succeeded=succeeded)
        wakeups += ready
        waiting = more  # of the last one: a join that waited for this one, too, may be done by now
    return wakeups if wakeups or waiting else runs.finish_if_done(conn, run_id)


def _place(row: Any) -> tuple[str, int]:
    return str(row.run_id), row.no


_ENDED = "s.run_id, s.no, s.join_no, s.status"
#: It was too late for the wait to begin, or it was revoked before.
_TOO_LATE = "coalesce(s.expires_at <= s.ready_at, false)"

#: Of the signals of one name, the first goes to the wait that began first.
_DELIVER = f"""
WITH waits AS (
  SELECT s.id, s.run_id, s.no, s.signal,
         row_number() OVER (PARTITION BY s.run_id, s.signal ORDER BY s.ready_at, s.no) AS place
    FROM byrd.steps s
   WHERE s.run_id = ANY(%(runs)s::uuid[]) AND s.status = 'waiting' AND s.signal IS NOT NULL AND NOT {_TOO_LATE}),
kept AS (
  SELECT g.id, g.run_id, g.name, g.payload, row_number() OVER (PARTITION BY g.run_id, g.name ORDER BY g.id) AS place
    FROM byrd.signals g WHERE g.run_id = ANY(%(runs)s::uuid[]) AND g.delivered_at IS NULL),
pairs AS (
  SELECT w.id, w.no, k.id AS signal_id, k.payload FROM waits w
    JOIN kept k ON k.run_id = w.run_id AND k.name = w.signal AND k.place = w.place),
delivered AS (
  UPDATE byrd.signals g SET step_no = p.no, delivered_at = {_NOW} FROM pairs p
   WHERE g.id = p.signal_id AND g.delivered_at IS NULL RETURNING g.id, g.run_id, g.step_no, g.name),
told AS (
  INSERT INTO byrd.events (run_id, step_no, event, detail)
  SELECT run_id, step_no, 'signal_delivered', json_build_object('signal', name, 'id', id)::text FROM delivered)
UPDATE byrd.steps s SET status = 'succeeded', result = p.payload, finished_at = {COMPLETED_AT}
  FROM pairs p WHERE s.id = p.id AND s.status = 'waiting' RETURNING {_ENDED}
"""

_REVOKED_ERROR, _EXPIRED_ERROR = (
    "'" + error_json("TaskRevokedError", "celery.exceptions", [why]) + "'" for why in ("revoked", "expired")
)
_TIMEOUT_ERROR = """json_build_object('exc_type', 'SignalTimeoutError', 'exc_module', 'byrd.errors', 'exc_message',
    json_build_array('the signal ''' || s.signal || '''' || coalesce(' of ' || s.signal_of, '')
      || ' did not come within '
      || trim_scale(round(extract(epoch FROM s.run_at - s.ready_at)::numeric, 3)) || ' s'))::text"""
#: A sleep hands on what it is given; an errback is given the id of the step that failed.
_GIVEN = """(SELECT CASE WHEN s.on_failure THEN to_json(i.id)::text ELSE i.result END
    FROM byrd.steps i WHERE i.run_id = s.run_id AND i.no = s.input)"""

_END_BY_TIME = f"""
WITH due AS MATERIALIZED (
  SELECT s.id, CASE WHEN {_TOO_LATE} THEN 'cancelled'
                    WHEN s.signal IS NOT NULL AND s.fallback IS NULL THEN 'failed' ELSE 'succeeded' END AS outcome
    FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id AND r.status = 'running'
   WHERE s.run_id = ANY(%(runs)s::uuid[]) AND s.kind = 'wait' AND s.status = 'waiting'
     AND (s.run_at <= {_NOW} OR {_TOO_LATE})
   ORDER BY s.run_at LIMIT {BATCH})
UPDATE byrd.steps s SET status = due.outcome, finished_at = {COMPLETED_AT},
       result = CASE WHEN due.outcome = 'succeeded' THEN coalesce({_GIVEN}, s.fallback) END,
       error = CASE due.outcome WHEN 'failed' THEN {_TIMEOUT_ERROR}
                 WHEN 'cancelled' THEN CASE WHEN s.expires_at = {REVOKED} THEN {_REVOKED_ERROR}
                                            ELSE {_EXPIRED_ERROR} END END
  FROM due WHERE s.id = due.id AND s.status = 'waiting' RETURNING {_ENDED}
"""

_LOOK_LATER = f"""
UPDATE byrd.steps s SET wake_at = CASE WHEN r.status = 'running' THEN coalesce(s.run_at, 'infinity'::timestamptz)
                                       ELSE 'infinity'::timestamptz END
  FROM byrd.runs r
 WHERE s.run_id = ANY(%(runs)s::uuid[]) AND s.kind = 'wait' AND s.status = 'waiting' AND s.wake_at <= {_NOW}
   AND r.id = s.run_id
"""


# -- tasks that give their slot back -----------------------------------------------------------------


def nap(
    conn: Connection, step_id: str, attempt: int, key: str, *, seconds: float | None, until: datetime | None
) -> list[Wakeup]:
    """running → ready at a later time, when the sub-step ``key`` is done."""
    row = query(
        conn,
        f"""SELECT greatest(0, coalesce(%(seconds)s, extract(epoch FROM %(until)s::timestamptz - {_NOW})))::float8
                     AS delay, s.status = 'running' AND s.attempt = %(attempt)s AS owned
              FROM {locks.SHARE_RUN_OF_STEP}, byrd.steps s WHERE s.id = %(id)s FOR UPDATE OF s""",
        {"id": step_id, "attempt": attempt, "seconds": seconds, "until": until},
    ).first()
    _refuse_unless_ours(conn, step_id, attempt, key, owned=row is not None and row.owned)
    wakeups = steps.hand_back(conn, step_id, attempt, delay=row.delay if row is not None else 0.0)
    _note(conn, step_id, attempt, key, done=True)
    return wakeups


def take(conn: Connection, step_id: str, attempt: int, signal: str, key: str, *, timeout: float | None) -> Taken:
    """Deliver the first kept signal to a running step, as the value of its sub-step ``key``, if there is one."""
    step = query(
        conn,
        f"SELECT s.run_id, s.no FROM {locks.SHARE_RUN_OF_STEP}, byrd.steps s WHERE s.id = %(id)s",
        {"id": step_id},
    ).first()
    steps.check_owner(conn, step_id, attempt)
    known = progress.remembered(conn, step_id, key)
    if known is not None:
        return Taken(known, late=False)
    run_id, no = step if step is not None else (None, None)  # without a step, nobody owns it
    params = {"id": step_id, "wait": _wait_key(key), "run": run_id, "no": no, "signal": signal}
    row = query(
        conn,
        f"""WITH taken AS (
              UPDATE byrd.signals g SET step_no = %(no)s, delivered_at = {_NOW} WHERE g.delivered_at IS NULL AND g.id =
                (SELECT id FROM byrd.signals WHERE run_id = %(run)s AND name = %(signal)s AND delivered_at IS NULL
                  ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING g.id, g.payload),
            told AS (
              INSERT INTO byrd.events (run_id, step_no, event, detail)
              SELECT %(run)s, %(no)s, 'signal_delivered', json_build_object('signal', %(signal)s::text, 'id', id)::text
                FROM taken)
            SELECT payload FROM taken""",
        params,
    ).first()
    if row is not None:
        settle(conn, step_id, attempt, key, row.payload)
        return Taken(row.payload, late=False)
    late = query(
        conn,
        f"""SELECT updated_at + %(timeout)s * interval '1 second' <= {_NOW} FROM byrd.checkpoints
            WHERE step_id = %(id)s AND name = %(wait)s""",
        {**params, "timeout": timeout},
    ).scalar()
    return Taken(None, late=bool(late) or timeout == 0)


def settle(conn: Connection, step_id: str, attempt: int, key: str, value: str | None) -> None:
    """End a running step's wait for a signal: with a value (JSON), or without one, so that another try waits anew."""
    steps.check_owner(conn, step_id, attempt)
    if value is not None:
        progress.remember(conn, step_id, attempt, key, value)
    params = {"id": step_id, "wait": _wait_key(key)}
    query(conn, "DELETE FROM byrd.checkpoints WHERE step_id = %(id)s AND name = %(wait)s", params)
    over = "UPDATE byrd.steps SET signal = NULL, signal_of = NULL WHERE id = %(id)s AND signal IS NOT NULL"
    query(conn, over, params)


def give_way(
    conn: Connection,
    step_id: str,
    attempt: int,
    signal: str,
    key: str,
    *,
    timeout: float | None,
    of: str | None = None,
) -> list[Wakeup]:
    """running → ready when the signal comes, or after ``timeout`` seconds from the first time; ``of``: who sends it."""
    locks.own_run_of(conn, step_id)
    wait = _wait_key(key)
    params = {"id": step_id, "attempt": attempt, "wait": wait, "signal": signal, "of": of, "timeout": timeout}
    so_far = query(
        conn,
        f"""SELECT greatest(0.001, %(timeout)s::float8 - extract(epoch FROM {_NOW} - coalesce(
              (SELECT updated_at FROM byrd.checkpoints WHERE step_id = %(id)s AND name = %(wait)s), {_NOW})))::float8
              AS left, EXISTS (SELECT 1 FROM byrd.steps
                                WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'running') AS owned""",
        params,
    ).one()
    _refuse_unless_ours(conn, step_id, attempt, wait, owned=so_far.owned)
    delay = _LONG_SECONDS if timeout is None else so_far.left
    wakeups = steps.hand_back(conn, step_id, attempt, delay=delay)
    _note(conn, step_id, attempt, wait, done=False)
    # A signal that came meanwhile is nothing to wait for; without a time-out there is no time.  A pause stays one.
    row = query(
        conn,
        f"""UPDATE byrd.steps s SET signal = %(signal)s, signal_of = %(of)s, run_at = at.time,
                   wake_at = CASE WHEN s.wake_at = 'infinity' THEN s.wake_at ELSE at.time END
              FROM (SELECT o.id, CASE
                      WHEN EXISTS (SELECT 1 FROM byrd.signals g WHERE g.run_id = o.run_id AND g.name = %(signal)s
                                    AND g.delivered_at IS NULL) THEN {_NOW}
                      WHEN %(timeout)s::float8 IS NULL THEN 'infinity'::timestamptz ELSE o.run_at END AS time
                      FROM byrd.steps o WHERE o.id = %(id)s) at
             WHERE s.id = at.id AND s.status = 'ready' AND s.attempt = %(attempt)s AND s.sends = 0
            RETURNING s.wake_at <= {_NOW} AS due""",
        params,
    ).first()
    if row is not None and row.due:
        query(conn, f"NOTIFY {CHANNEL}")
    return wakeups


def _refuse_unless_ours(conn: Connection, step_id: str, attempt: int, mark: str, *, owned: bool) -> None:
    """Raise :class:`StaleAttempt` unless the attempt owns the step, or has left this mark when it gave its slot back.

    That it was handed back is not enough: a worker that shuts down does so too, for an attempt that may live a moment
    longer; a mark would then tell the next one that its sleep is over.
    """
    left = "SELECT 1 FROM byrd.checkpoints WHERE step_id = %(id)s AND name = %(mark)s"
    if not owned and query(conn, left, {"id": step_id, "mark": mark}).first() is None:
        raise StaleAttempt(f"step {step_id}: attempt {attempt} may not give its slot back: it does not own it any more")


def _note(conn: Connection, step_id: str, attempt: int, name: str, *, done: bool) -> None:
    """Leave a sub-step's mark; the caller has ended the attempt in this transaction, or finds that it had."""
    query(
        conn,
        """INSERT INTO byrd.checkpoints (step_id, name, attempt, value, done)
           VALUES (%(id)s, %(name)s, %(attempt)s, CASE WHEN %(done)s THEN 'null' END, %(done)s)
           ON CONFLICT DO NOTHING""",
        {"id": step_id, "name": name, "attempt": attempt, "done": done},
    )


def _wait_key(key: str) -> str:
    return f"wait:{key}"


# -- reading ---------------------------------------------------------------------------------------


def list_awaited(
    conn: Connection,
    *,
    signal: str | None = None,
    workflow: str | None = None,
    of: str | None = None,
    limit: int = 50,
) -> list[Awaited]:
    """Return the steps that wait for a signal, those that have waited longest first.

    ``signal``: a name, or the beginning of names with a ``*`` after it, which is in no name itself.
    """
    prefix = signal[:-1] if signal is not None and signal.endswith("*") else None
    rows = query(
        conn,
        """SELECT s.run_id::text, r.workflow, r.title, r.status AS run_status, s.no AS step_no, s.signal,
                  s.signal_of AS of, s.ready_at AS since, nullif(s.run_at, 'infinity') AS until, s.fallback AS default
             FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
            WHERE s.signal IS NOT NULL AND s.status IN ('waiting','ready')
              AND (s.status = 'waiting' OR s.run_at > clock_timestamp())
              AND (%(signal)s::text IS NULL OR s.signal = %(signal)s OR starts_with(s.signal, %(prefix)s::text))
              AND (%(of)s::text IS NULL OR s.signal_of = %(of)s)
              AND (%(workflow)s::text IS NULL OR r.workflow = %(workflow)s)
            ORDER BY s.ready_at, s.run_id, s.no LIMIT %(limit)s""",
        {"signal": signal, "prefix": prefix, "of": of, "workflow": workflow, "limit": limit},
    ).mappings()
    return [Awaited(**row) for row in rows]
