"""The transitions of a step.  Each is one guarded UPDATE; what follows from it commits with it.

Every writer of a running step passes the attempt number that it claimed with: the fence.  Once the step has
been given to somebody else, or its run was cancelled, the guard refuses and :class:`StaleAttempt` is raised.
The same outcome of the same attempt is accepted twice, for the answer to the first may have been lost.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from byrd.errors import StaleAttempt
from byrd.items import EACH
from byrd.model import Mark, Outcome, RunStatus, StepKind, StepStatus
from byrd.store import flow, items, runs, undo
from byrd.store.flow import COMPLETED_AT, RESEND_SECONDS, error_json
from byrd.store.locks import SHARE_RUN_AND_EACH_OF_STEP, SHARE_RUN_OF_STEP, TRY_SHARE_RUN
from byrd.store.rows import UNCLAIMED, WAKEUP, Claim, Wakeup, query, wakeups_of

#: A step that loses its worker more often than this is failed: it is probably what kills the worker.
MAX_PREEMPTIONS = 5
#: How long a step that may not run beside another on this worker waits until a worker is asked again.
SUSPECT_SECONDS = 1.0
#: Of the attempts that count, when the first began: the budget of a retry policy goes by it.
TRIED_SINCE = "tried_since = CASE WHEN s.retries > 0 THEN s.tried_since ELSE s.started_at END"
#: How often a step that fails is tried again where nothing may be rolled back because of it, and after which pauses.
PATIENCE = 10
_LONGEST_PAUSE_SECONDS = 300.0
#: How long a step waits whose message came to a worker that may not claim it.
SEND_AGAIN_SECONDS = 0.5

_NOW = "clock_timestamp()"

#: The run ``r``, and the saga of the step ``s``, if it is a step of one, let it start.
_MAY_GO_ON = """CASE WHEN s.kind = 'compensation' THEN r.status IN ('compensating','running','cancelling')
    ELSE r.status = 'running' AND (s.saga IS NULL OR EXISTS (SELECT 1 FROM byrd.steps g
           WHERE g.run_id = s.run_id AND g.no = s.saga AND g.status IN ('pending','succeeded'))) END"""

_CLAIM = f"""
UPDATE byrd.steps s
   SET status = 'running', attempt = s.attempt + 1, started_at = {_NOW},
       worker_id = %(worker)s, pid = %(pid)s, claim = %(claim)s
  FROM byrd.runs r, (SELECT lease_until, stopping FROM byrd.workers WHERE id = %(worker)s FOR KEY SHARE) w
 WHERE s.id = %(id)s AND s.status = 'ready' AND s.attempt = %(attempt)s AND s.wake_at < 'infinity'
   AND s.run_at <= {_NOW} AND (s.attempt > 0 OR s.expires_at IS NULL OR s.expires_at > {_NOW})
   AND s.task = %(task)s AND r.id = s.run_id AND (s.preemptions < %(suspect)s OR %(alone)s)
   AND {_MAY_GO_ON} AND CASE WHEN s.mark = 'pivot' THEN NOT {undo.POINTLESS} ELSE true END
   AND w.lease_until > {_NOW} AND NOT w.stopping
RETURNING s.id
"""
# expires_at is a time to start by: a step that has started once may go on.  task: a message may name any task, so the
# step must be one of that task.  Two guards look superfluous.  wake_at: a pause that commits while this statement waits
# for the step's row is seen in that row only.  FOR KEY SHARE: a worker is not given up between this check and the
# commit, or nobody would ever recover what it has just claimed.

#: What a :class:`Claim` is read from, up to the WHERE.
CLAIM_COLUMNS = """
SELECT s.id, s.run_id, s.no, s.kind, s.task, s.queue, s.attempt, s.retries, s.preemptions, s.args, s.kwargs, s.options,
       s.group_id, s.join_no, s.join_pos, s.compensates, p.id AS parent_id,
       s.on_failure, s.input AS input_no, i.result AS input, p.task AS parent_task,
       CASE WHEN s.on_failure THEN coalesce(p.error, c.error) END AS after_error
  FROM byrd.steps s
  LEFT JOIN byrd.steps p ON p.run_id = s.run_id AND p.no = s.after
  LEFT JOIN byrd.steps i ON i.run_id = s.run_id AND i.no = s.input
  LEFT JOIN byrd.steps c ON c.run_id = s.run_id AND c.no = p.cause
"""
_CLAIMED = f"{CLAIM_COLUMNS} WHERE s.id = %(id)s AND s.status = 'running' AND s.claim = %(claim)s"


def claim(
    conn: Connection,
    step_id: str,
    attempt: int,
    *,
    task: str,
    worker_id: str,
    pid: int,
    token: str,
    max_preemptions: int = MAX_PREEMPTIONS,
) -> Claim | None:
    """ready → running.  ``attempt``: the number of the last attempt, as the message says it.

    Returns None when there is nothing to claim: a duplicate or stale message, a step whose time has not come
    or is over, a run that is paused or cancelled, a worker without a lease, a pivot that must not start any more
    (:func:`byrd.store.sagas.stop_pivot`).  ``token`` is this call's own: a claim whose answer was lost is found again
    by it.
    """
    params = {
        "id": step_id, "attempt": attempt, "task": task, "worker": worker_id, "pid": pid, "claim": token,
        "suspect": suspect_after(max_preemptions), "alone": False,
    }  # fmt: skip
    query(conn, _CLAIM, params)
    row = query(conn, _CLAIMED, params).mappings().first()
    if row is None and _may_run_alone(conn, params):
        query(conn, _CLAIM, {**params, "alone": True})
        row = query(conn, _CLAIMED, params).mappings().first()
    if row is None:
        _send_again(conn, params)
        return None
    return Claim(**{**row, "run_id": str(row["run_id"])})


def _send_again(conn: Connection, params: dict[str, Any]) -> None:
    """Have a step that is ready, but that this worker may not claim (it stops, or has lost its lease), sent again soon.

    Its message is used up, and in a queue that is busy, or empty, nobody would miss it for long.
    """
    query(
        conn,
        f"""UPDATE byrd.steps s SET sends = 0, wake_at = {_NOW} + {SEND_AGAIN_SECONDS} * interval '1 second'
              FROM byrd.runs r
             WHERE s.id = %(id)s AND s.attempt = %(attempt)s AND s.status = 'ready' AND s.task = %(task)s
               AND s.sends > 0 AND s.wake_at < 'infinity' AND s.run_at <= {_NOW} AND r.id = s.run_id
               AND {_MAY_GO_ON}""",
        params,
    )


def suspect_after(max_preemptions: int) -> int:
    """Return how often a step must have lost its worker for it to be suspected of killing workers.

    Steps that die together cannot be told apart, so no two suspects run on one worker at a time.  Then the one that
    kills its worker does so alone among them, and those that merely ran beside it come to their end.
    """
    return max(1, (max_preemptions + 1) // 2)


def _may_run_alone(conn: Connection, params: dict[str, Any]) -> bool:
    """Tell whether the step is a suspect, ready, and the worker runs no other; if it does, send ours again later."""
    suspect = """SELECT 1 FROM byrd.steps WHERE id = %(id)s AND status = 'ready' AND attempt = %(attempt)s
                    AND preemptions >= %(suspect)s AND wake_at < 'infinity'"""
    if not query(conn, suspect, params).first():
        return False
    # One suspect at a time claims here: what another has claimed is seen by the next statement.
    query(conn, "SELECT 1 FROM byrd.workers WHERE id = %(worker)s FOR NO KEY UPDATE", params)
    other = """SELECT 1 FROM byrd.steps WHERE worker_id = %(worker)s AND status = 'running'
                  AND preemptions >= %(suspect)s"""
    if not query(conn, other, params).first():
        return True
    query(
        conn,
        f"""UPDATE byrd.steps SET sends = 0, wake_at = {_NOW} + {SUSPECT_SECONDS} * interval '1 second'
            WHERE id = %(id)s AND status = 'ready' AND attempt = %(attempt)s AND wake_at < 'infinity'""",
        params,
    )
    return False


_COMPLETE = f"""
UPDATE byrd.steps s SET status = 'succeeded', result = %(result)s, finished_at = {COMPLETED_AT}, {UNCLAIMED}
  FROM {SHARE_RUN_OF_STEP}
 WHERE s.id = %(id)s AND s.attempt = %(attempt)s AND s.status = 'running'
RETURNING s.run_id, s.no, s.join_no, s.kind, s.saga, s.mark
"""


def complete(conn: Connection, step_id: str, attempt: int, result: str) -> list[Wakeup]:
    """running → succeeded, with the result (JSON text); make ready what waited for it.

    Raises :class:`StaleAttempt` unless this attempt owns the step, or had completed it already.
    """
    row = query(conn, _COMPLETE, {"id": step_id, "attempt": attempt, "result": result}).first()
    return after_success(conn, step_id, attempt, row)


def after_success(conn: Connection, step_id: str, attempt: int, row: Any) -> list[Wakeup]:
    """Do all that follows from the success of a step, whose ``row`` was just written.

    Without a row, raises :class:`StaleAttempt` unless this very attempt had completed it.
    """
    if row is None:
        _refuse_unless_completed(conn, step_id, attempt)
        return []
    run_id = str(row.run_id)
    if row.kind == StepKind.COMPENSATION:
        return runs.go_on_undoing(conn, run_id, row.saga)
    if row.kind == StepKind.ITEM:
        wakeups = items.ended(conn, run_id, row.join_no, succeeded=True)
    else:
        wakeups = runs.advance(conn, run_id, row.no, row.join_no, succeeded=True, pivot=row.mark == Mark.PIVOT)
    if row.saga is not None:
        flow.look_at_sagas(conn, run_id)
    return wakeups


def fail(
    conn: Connection, step_id: str, attempt: int, error: str, *, owner: str | None = None, pid: int | None = None
) -> list[Wakeup]:
    """running → failed, with the error (JSON text); call errbacks, skip what waited for its success.

    → ready where nothing may be rolled back because of it: after the run's pivot, and when the step is retriable.  Then
    it is tried again, ten times, after pauses that grow to five minutes.
    ``owner``: the worker that must hold the step, and ``pid`` its process, where a message's attempt number alone is
    known.
    """
    pause = pause_of_persistence(conn, step_id)
    if pause is not None:
        row = _give_back(conn, step_id, attempt, Outcome.FAILED, error, delay=pause, preempted=0, owner=owner, pid=pid)
        if row is None:
            refuse_unless_recorded(conn, step_id, attempt, Outcome.FAILED)
            return []
        return _settle_returned(conn, row)
    row = end_attempt(conn, step_id, attempt, "failed", Outcome.FAILED, error, owner=owner, pid=pid)
    if row is None:
        refuse_unless_recorded(conn, step_id, attempt, Outcome.FAILED)
        return []
    return _after_failure(conn, row)


def pause_of_persistence(conn: Connection, step_id: str) -> float | None:
    """Return after how many seconds a step that fails now is tried again nonetheless; None when it is not."""
    row = query(
        conn,
        """SELECT (SELECT count(*) FROM byrd.attempts a WHERE a.step_id = s.id AND a.outcome = 'failed'
                    AND a.ended_at > coalesce((SELECT max(e.at) FROM byrd.events e
                         WHERE e.run_id = s.run_id AND e.event = 'retried'), '-infinity')) AS before
             FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
            WHERE s.id = %(id)s AND s.kind IN ('task','callback') AND r.status IN ('running','paused')
              AND (s.mark = 'retriable' OR r.pivot IS NOT NULL)""",
        {"id": step_id},
    ).first()
    if row is None or row.before >= PATIENCE:
        return None
    return min(_LONGEST_PAUSE_SECONDS, 2.0 ** int(row.before))


def retry(
    conn: Connection,
    step_id: str,
    attempt: int,
    error: str | None,
    *,
    delay: float = 0.0,
    eta: datetime | None = None,
    args: str | None = None,
    kwargs: str | None = None,
    queue: str | None = None,
    options: str | None = None,
    counted: bool = True,
    owner: str | None = None,
    pid: int | None = None,
) -> list[Wakeup]:
    """running → ready at a later time, the retry count raised, unless it is not ``counted``.

    New arguments replace all the old ones.  ``owner`` and ``pid`` as for :func:`fail`.
    """
    row = end_attempt(
        conn, step_id, attempt, "ready", Outcome.RETRIED, error,
        extra=f"""{TRIED_SINCE}, retries = s.retries + %(counted)s, sends = 0, ready_at = {_NOW}, started_at = NULL,
                  limit_name = CASE WHEN %(args)s IS NULL THEN s.limit_name END,
                  limit_key = CASE WHEN %(args)s IS NULL THEN s.limit_key END,
                  args = coalesce(%(args)s, s.args), kwargs = coalesce(%(kwargs)s, s.kwargs),
                  input = CASE WHEN %(args)s IS NULL THEN s.input END, options = coalesce(%(options)s, s.options),
                  queue = coalesce(%(queue)s, s.queue), solo = s.solo OR %(options)s::text IS NOT NULL,
                  run_at = coalesce(%(eta)s, {_NOW} + %(delay)s * interval '1 second'),
                  wake_at = coalesce(%(eta)s, {_NOW} + %(delay)s * interval '1 second')""",
        params={
            "args": args, "kwargs": kwargs, "queue": queue, "options": options, "delay": delay, "eta": eta,
            "counted": int(counted),
        },
        owner=owner, pid=pid,
    )  # fmt: skip
    if row is None:
        refuse_unless_recorded(conn, step_id, attempt, Outcome.RETRIED)
        return []
    return _settle_returned(conn, row)


def hand_back(
    conn: Connection,
    step_id: str,
    attempt: int,
    *,
    delay: float = 0.0,
    owner: str | None = None,
    pid: int | None = None,
) -> list[Wakeup]:
    """running → ready, without blame: the worker shuts down or the run is paused."""
    row = _give_back(conn, step_id, attempt, Outcome.HANDED_BACK, None, delay=delay, preempted=0, owner=owner, pid=pid)
    if row is None:
        refuse_unless_recorded(conn, step_id, attempt, Outcome.HANDED_BACK)
        return []
    return _settle_returned(conn, row)


def put_back(conn: Connection, step_id: str, attempt: int, *, worker_id: str, pid: int) -> list[Wakeup]:
    """running → ready for a step that was claimed along with others and has not begun: as if it never had been.

    So its attempt is none, and the next one has the same number.  Nobody else knows of this one.
    """
    row = query(
        conn,
        f"""UPDATE byrd.steps s SET status = 'ready', attempt = s.attempt - 1, started_at = NULL, {UNCLAIMED},
                   sends = 0, wake_at = {_NOW}, ready_at = {_NOW}
              FROM {SHARE_RUN_OF_STEP}
             WHERE s.id = %(id)s AND s.attempt = %(attempt)s AND s.status = 'running' AND s.worker_id = %(worker)s
               AND s.pid = %(pid)s RETURNING {_ENDED}""",
        {"id": step_id, "attempt": attempt, "worker": worker_id, "pid": pid},
    ).first()
    return _settle_returned(conn, row) if row is not None else []


def preempt(
    conn: Connection,
    worker_id: str,
    *,
    pid: int | None = None,
    step: tuple[str, int] | None = None,
    reason: str,
    error: str | None = None,
    max_preemptions: int = MAX_PREEMPTIONS,
    limit: int = 200,
) -> list[Wakeup]:
    """running → ready for the steps of a worker, of one of its pool processes, or for one attempt, that is gone.

    A step that has lost its worker ``max_preemptions`` times before is failed instead, those of one run at a time.
    Steps that somebody is writing just now, and those beyond ``limit``, are left for the next time: it waits for
    nobody.  For one attempt there is no next time, so it waits.  ``error`` (JSON): recorded in place of the loss.
    """
    if step is not None:
        found = query(
            conn,
            """SELECT id, run_id, attempt, preemptions, true AS free FROM byrd.steps
                WHERE id = %(step)s AND attempt = %(attempt)s AND status = 'running' AND worker_id = %(worker)s
                  AND (%(pid)s::int IS NULL OR pid = %(pid)s)""",
            {"worker": worker_id, "pid": pid, "step": step[0], "attempt": step[1]},
        )
    else:
        found = query(
            conn,
            f"""SELECT s.id, s.run_id, s.attempt, s.preemptions, {TRY_SHARE_RUN} AS free FROM byrd.steps s
                WHERE s.status = 'running' AND s.worker_id = %(worker)s AND (%(pid)s::int IS NULL OR s.pid = %(pid)s)
                ORDER BY s.run_id, s.no LIMIT %(limit)s FOR UPDATE SKIP LOCKED""",
            {"worker": worker_id, "pid": pid, "limit": limit},
        )
    rows = found.all()
    wakeups: list[Wakeup] = []
    first_run = None
    for step_id, run_id, attempt, preemptions, free in rows:
        if not free:
            continue
        first_run = first_run or run_id
        if preemptions >= max_preemptions:
            if run_id != first_run:
                continue  # its joins come before the row of any run, which may be locked by now: next time
            lost = preemptions + 1
            last = error or error_json(
                "StepLostError", "byrd.errors", [f"lost its worker {lost} times; the last: {reason}"]
            )
            ended = end_attempt(
                conn, step_id, attempt, "failed", Outcome.PREEMPTED, last, extra=f"preemptions = {lost}"
            )
            if ended is not None:
                wakeups += _after_failure(conn, ended)
            continue
        lost_error = error or error_json("WorkerLostError", "billiard.exceptions", [reason])
        ended = _give_back(conn, step_id, attempt, Outcome.PREEMPTED, lost_error, delay=0.0, preempted=1)
        if ended is not None:
            wakeups += _settle_returned(conn, ended)
    return wakeups


def revoke(
    conn: Connection,
    step_id: str,
    reason: str,
    *,
    attempt: int | None = None,
    owner: str | None = None,
    pid: int | None = None,
) -> list[Wakeup]:
    """ready, waiting, or running in ``attempt``, → cancelled: Celery's revoke, or it expired before it started.

    Not a saga that is waiting: it has failed, and ends when what it had done is undone.
    """
    error = error_json("TaskRevokedError", "celery.exceptions", [reason])
    row = None
    if attempt is not None:
        row = end_attempt(conn, step_id, attempt, "cancelled", Outcome.CANCELLED, error, owner=owner, pid=pid)
    if row is None:
        row = query(
            conn,
            f"""UPDATE byrd.steps s SET status = 'cancelled', error = %(error)s, finished_at = {_NOW}, limit_slot = NULL
                FROM {SHARE_RUN_AND_EACH_OF_STEP}
                WHERE s.id = %(id)s AND s.status IN ('ready','waiting') AND s.kind <> 'saga' RETURNING {_ENDED}""",
            {"id": step_id, "error": error},
        ).first()
    return _after_failure(conn, row) if row is not None else []


def revoke_waiting(conn: Connection, step_id: str) -> list[Wakeup]:
    """ready, waiting → cancelled; a pending step is cancelled once it is ready.  What runs goes on, as in Celery."""
    # First the one, then the other: a step that becomes ready in between is found by the second.  solo: its message is
    # what ends it, and nobody runs it without.
    query(
        conn,
        f"""UPDATE byrd.steps SET expires_in = NULL, expires_at = {flow.REVOKED}, solo = true
            WHERE id = %(id)s AND status = 'pending' AND kind NOT IN ('join','saga')""",
        {"id": step_id},
    )
    return revoke(conn, step_id, "revoked")


def expire(conn: Connection, step_id: str) -> list[Wakeup]:
    """ready → cancelled when the step's time to start is over."""
    row = query(
        conn,
        f"""UPDATE byrd.steps s SET status = 'cancelled', finished_at = {_NOW}, limit_slot = NULL,
                   error = CASE WHEN s.expires_at = {flow.REVOKED} THEN %(revoked)s ELSE %(expired)s END
            FROM {SHARE_RUN_AND_EACH_OF_STEP}
            WHERE s.id = %(id)s AND s.status = 'ready' AND s.attempt = 0 AND s.expires_at <= {_NOW}
            RETURNING {_ENDED}""",
        {
            "id": step_id,
            **{why: error_json("TaskRevokedError", "celery.exceptions", [why]) for why in ("expired", "revoked")},
        },
    ).first()
    return _after_failure(conn, row) if row is not None else []


def miss_start(conn: Connection, step_id: str) -> list[Wakeup]:
    """ready → failed when nobody has started the step in the time that its ``schedule_to_start`` allows."""
    row = query(
        conn,
        f"""UPDATE byrd.steps s SET status = 'failed', finished_at = {_NOW}, limit_slot = NULL,
                   error = json_build_object('exc_type', 'ScheduleToStartTimeoutError', 'exc_module', 'byrd.errors',
                     'exc_message', json_build_array('nobody has started it within '
                       || (s.options::json -> 'byrd_timeouts' ->> 'schedule_to_start') || ' s'))::text
            FROM {SHARE_RUN_AND_EACH_OF_STEP}
            WHERE s.id = %(id)s AND s.status = 'ready' AND s.wake_at < 'infinity' AND s.start_by <= {_NOW}
            RETURNING {_ENDED}""",
        {"id": step_id},
    ).first()
    return _after_failure(conn, row) if row is not None else []


def ignore(conn: Connection, step_id: str, attempt: int, error: str) -> list[Wakeup]:
    """running → cancelled, without errbacks: the task raised Ignore, so it has no outcome for anyone to act on."""
    row = end_attempt(conn, step_id, attempt, "cancelled", Outcome.CANCELLED, error)
    if row is None:
        refuse_unless_recorded(conn, step_id, attempt, Outcome.CANCELLED)
        return []
    flow.skip_errbacks(conn, str(row.run_id), row.no)
    return _after_failure(conn, row)


def abandon(conn: Connection, step_id: str, attempt: int) -> list[Wakeup]:
    """running → cancelled at a checkpoint: its run is being cancelled, or another step of its saga has failed."""
    error = error_json("TaskRevokedError", "celery.exceptions", ["cancelled"])
    cause = "cause = (SELECT g.cause FROM byrd.steps g WHERE g.run_id = s.run_id AND g.no = s.saga)"
    row = end_attempt(conn, step_id, attempt, "cancelled", Outcome.CANCELLED, error, extra=cause)
    if row is None:
        refuse_unless_recorded(conn, step_id, attempt, Outcome.CANCELLED)
        return []
    return _after_failure(conn, row)


def check_owner(conn: Connection, step_id: str, attempt: int) -> None:
    """Raise :class:`StaleAttempt` unless ``attempt`` owns the running step; lock it for this transaction."""
    found = query(
        conn,
        "SELECT 1 FROM byrd.steps WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'running' FOR NO KEY UPDATE",
        {"id": step_id, "attempt": attempt},
    ).first()
    if found is None:
        raise StaleAttempt(f"step {step_id}: attempt {attempt} does not own it any more")


# -- the end of an attempt -------------------------------------------------------------------------

_ENDED = "s.id, s.run_id, s.no, s.kind, s.task, s.join_no, s.status, s.saga"


def end_attempt(
    conn: Connection,
    step_id: str,
    attempt: int,
    status: str,
    outcome: Outcome,
    error: str | None,
    *,
    owner: str | None = None,
    pid: int | None = None,
    extra: str = "",
    params: dict[str, Any] | None = None,
) -> Any:
    """Move a running step to ``status`` under the fence, and record how the attempt ended."""
    final = status in ("failed", "cancelled", "skipped")
    sets = [f"status = '{status}'", UNCLAIMED, *([extra] if extra else [])]
    if final:
        sets += [f"finished_at = {_NOW}", "error = %(error)s"]
    return query(
        conn,
        f"""WITH old AS (
              SELECT o.id, o.attempt, o.started_at, (SELECT hostname FROM byrd.workers WHERE id = o.worker_id) AS host
                FROM {SHARE_RUN_OF_STEP}, byrd.steps o
               WHERE o.id = %(id)s AND o.attempt = %(attempt)s AND o.status = 'running'
                 AND (%(owner)s::uuid IS NULL OR o.worker_id = %(owner)s)
                 AND (%(pid)s::int IS NULL OR o.pid = %(pid)s) FOR UPDATE OF o),
            ended AS (
              INSERT INTO byrd.attempts (step_id, attempt, outcome, error, worker, started_at)
              SELECT id, attempt, %(outcome)s, %(error)s, host, started_at FROM old ON CONFLICT DO NOTHING)
            UPDATE byrd.steps s SET {", ".join(sets)} FROM old
             WHERE s.id = old.id AND s.attempt = old.attempt AND s.status = 'running' RETURNING {_ENDED}""",
        {
            "id": step_id, "attempt": attempt, "outcome": outcome.value, "error": error, "owner": owner, "pid": pid,
            **(params or {}),
        },
    ).first()  # fmt: skip


def _give_back(
    conn: Connection,
    step_id: str,
    attempt: int,
    outcome: Outcome,
    error: str | None,
    *,
    delay: float,
    preempted: int,
    owner: str | None = None,
    pid: int | None = None,
) -> Any:
    return end_attempt(
        conn, step_id, attempt, "ready", outcome, error, owner=owner, pid=pid,
        # Solo once it has lost a worker: it is no longer taken along with others, which it may pull down.
        extra=f"""preemptions = s.preemptions + %(preempted)s, solo = s.solo OR %(preempted)s > 0,
                  started_at = NULL, ready_at = {_NOW}, sends = 0,
                  run_at = {_NOW} + %(delay)s * interval '1 second',
                  wake_at = {_NOW} + %(delay)s * interval '1 second'""",
        params={"preempted": preempted, "delay": delay},
    )  # fmt: skip


def _settle_returned(conn: Connection, row: Any) -> list[Wakeup]:
    """A step went back to ready: publish it, unless its run is paused.

    It ends here when its run is being cancelled, or it is an item whose each has ended.
    """
    run = query(conn, "SELECT status FROM byrd.runs WHERE id = %(run)s", {"run": row.run_id}).one()
    if run.status == RunStatus.CANCELLING and row.kind != StepKind.COMPENSATION:
        return revoke(conn, row.id, "cancelled")
    if row.kind == StepKind.ITEM and not items.wanted(conn, str(row.run_id), row.join_no):
        return revoke(conn, row.id, items.EACH_ENDED)
    if row.saga is not None and row.kind != StepKind.COMPENSATION:
        flow.look_at_sagas(conn, str(row.run_id))  # one that has failed cancels it
    if run.status == RunStatus.PAUSED:
        query(conn, "UPDATE byrd.steps SET wake_at = 'infinity' WHERE id = %(id)s AND status = 'ready'", {"id": row.id})
        return []
    found = query(
        conn,
        f"""UPDATE byrd.steps s
               SET sends = 1, wake_at = greatest(s.run_at, {_NOW} + {RESEND_SECONDS} * interval '1 second')
            WHERE s.id = %(id)s AND s.status = 'ready' AND s.run_at <= {_NOW} RETURNING {WAKEUP}""",
        {"id": row.id},
    )
    return wakeups_of(found)


def _after_failure(conn: Connection, row: Any) -> list[Wakeup]:
    if row.kind == "compensation":
        runs.stick(conn, str(row.run_id), row.no)
        return []
    if row.kind == StepKind.ITEM:
        wakeups = items.ended(conn, str(row.run_id), row.join_no, succeeded=False)
    else:
        if row.task == EACH:
            items.drop(conn, str(row.run_id), row.no)
        wakeups = runs.advance(conn, str(row.run_id), row.no, row.join_no, succeeded=False)
    if row.saga is not None:
        flow.look_at_sagas(conn, str(row.run_id))
    return wakeups


def _refuse_unless_completed(conn: Connection, step_id: str, attempt: int) -> None:
    """Raise :class:`StaleAttempt`, unless this very attempt has completed the step."""
    row = query(conn, "SELECT status, attempt FROM byrd.steps WHERE id = %(id)s", {"id": step_id}).first()
    if row is None or row.attempt != attempt or row.status != StepStatus.SUCCEEDED:
        raise _stale(step_id, attempt, row)


def refuse_unless_recorded(conn: Connection, step_id: str, attempt: int, outcome: Outcome) -> None:
    """Raise :class:`StaleAttempt`, unless this very attempt is on record as having ended so."""
    row = query(
        conn,
        """SELECT s.status, s.attempt, a.outcome FROM byrd.steps s
           LEFT JOIN byrd.attempts a ON a.step_id = s.id AND a.attempt = %(attempt)s WHERE s.id = %(id)s""",
        {"id": step_id, "attempt": attempt},
    ).first()
    if row is None or row.outcome != outcome:
        raise _stale(step_id, attempt, row)


def _stale(step_id: str, attempt: int, row: Any) -> StaleAttempt:
    if row is None:
        return StaleAttempt(f"step {step_id} does not exist any more")
    return StaleAttempt(f"step {step_id}: attempt {attempt} may not write; it is {row.status}, attempt {row.attempt}")
