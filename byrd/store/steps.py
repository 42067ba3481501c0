"""The transitions of a step.  Each is one guarded UPDATE; what follows from it commits with it.

Every writer of a running step passes the attempt number that it claimed with: the fence.  Once the step has
been given to somebody else, or its run was cancelled, the guard refuses and :class:`StaleAttempt` is raised.
The same outcome of the same attempt is accepted twice, for the answer to the first may have been lost.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from byrd.canvas import Plan
from byrd.errors import IllegalTransitionError, StaleAttempt, StepCancelled
from byrd.model import Outcome, RunStatus, StepKind, StepStatus
from byrd.store import locks, plans
from byrd.store.locks import SHARE_RUN_OF_STEP, TRY_SHARE_RUN
from byrd.store.rows import WAKEUP, Claim, Wakeup, query

#: A ready step whose message was just published is looked at again by the relay after this time.
RESEND_SECONDS = 2.0
#: A step that loses its worker more often than this is failed: it is probably what kills the worker.
MAX_PREEMPTIONS = 5

_NOW = "clock_timestamp()"
_UNCLAIMED = "worker_id = NULL, pid = NULL, claim = NULL"

_CLAIM = f"""
UPDATE byrd.steps s
   SET status = 'running', attempt = s.attempt + 1, started_at = {_NOW},
       worker_id = %(worker)s, pid = %(pid)s, claim = %(claim)s
  FROM byrd.runs r, (SELECT lease_until, stopping FROM byrd.workers WHERE id = %(worker)s FOR KEY SHARE) w
 WHERE s.id = %(id)s AND s.status = 'ready' AND s.attempt = %(attempt)s AND s.wake_at < 'infinity'
   AND s.run_at <= {_NOW} AND (s.expires_at IS NULL OR s.expires_at > {_NOW})
   AND r.id = s.run_id AND r.status = CASE WHEN s.kind = 'compensation' THEN 'compensating' ELSE 'running' END
   AND w.lease_until > {_NOW} AND NOT w.stopping
RETURNING s.id
"""
# Two guards look superfluous.  wake_at: a pause that commits while this statement waits for the step's row is seen in
# that row only.  FOR KEY SHARE: a worker is not given up between this check and the commit, or nobody would ever
# recover what it has just claimed.

_CLAIMED = """
SELECT s.id, s.run_id, s.no, s.kind, s.task, s.attempt, s.retries, s.preemptions, s.args, s.kwargs, s.options,
       s.group_id, s.join_no, s.join_pos, s.compensates, p.id AS parent_id,
       s.on_failure, s.input AS input_no, i.result AS input, p.task AS parent_task,
       CASE WHEN s.on_failure THEN coalesce(p.error, c.error) END AS after_error
  FROM byrd.steps s
  LEFT JOIN byrd.steps p ON p.run_id = s.run_id AND p.no = s.after
  LEFT JOIN byrd.steps i ON i.run_id = s.run_id AND i.no = s.input
  LEFT JOIN byrd.steps c ON c.run_id = s.run_id AND c.no = p.cause
 WHERE s.id = %(id)s AND s.status = 'running' AND s.claim = %(claim)s
"""


def claim(conn: Connection, step_id: str, attempt: int, *, worker_id: str, pid: int, token: str) -> Claim | None:
    """ready → running.  ``attempt``: the number of the last attempt, as the message says it.

    Returns None when there is nothing to claim: a duplicate or stale message, a step whose time has not come
    or is over, a run that is paused or cancelled, a worker without a lease.  ``token`` is this call's own: a
    claim whose answer was lost is found again by it.
    """
    params = {"id": step_id, "attempt": attempt, "worker": worker_id, "pid": pid, "claim": token}
    query(conn, _CLAIM, params)
    row = query(conn, _CLAIMED, params).mappings().first()
    if row is None:
        return None
    return Claim(**{**row, "run_id": str(row["run_id"])})


def compensated_call(conn: Connection, run_id: str, no: int) -> tuple[str, str | None, str, str]:
    """Return what a compensation is called with: the step's result, its input, its args and its kwargs (JSON)."""
    row = query(
        conn,
        """SELECT s.result, i.result AS input, s.args, s.kwargs FROM byrd.steps s
           LEFT JOIN byrd.steps i ON i.run_id = s.run_id AND i.no = s.input
           WHERE s.run_id = %(run)s AND s.no = %(no)s""",
        {"run": run_id, "no": no},
    ).one()
    return (row.result, row.input, row.args, row.kwargs)


_COMPLETE = f"""
UPDATE byrd.steps s SET status = 'succeeded', result = %(result)s, finished_at = {_NOW}, {_UNCLAIMED}
  FROM {SHARE_RUN_OF_STEP}
 WHERE s.id = %(id)s AND s.attempt = %(attempt)s AND s.status = 'running'
RETURNING s.run_id, s.no, s.join_no
"""


def complete(conn: Connection, step_id: str, attempt: int, result: str) -> list[Wakeup]:
    """running → succeeded, with the result (JSON text); make ready what waited for it.

    Raises :class:`StaleAttempt` unless this attempt owns the step, or had completed it already.
    """
    row = query(conn, _COMPLETE, {"id": step_id, "attempt": attempt, "result": result}).first()
    if row is None:
        _refuse_unless_completed(conn, step_id, attempt)
        return []
    return advance(conn, str(row.run_id), row.no, row.join_no, succeeded=True)


def fail(conn: Connection, step_id: str, attempt: int, error: str) -> list[Wakeup]:
    """running → failed, with the error (JSON text); call errbacks, skip what waited for its success."""
    row = _end(conn, step_id, attempt, "failed", Outcome.FAILED, error)
    if row is None:
        _refuse_unless_recorded(conn, step_id, attempt, Outcome.FAILED)
        return []
    return _after_failure(conn, row)


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
) -> list[Wakeup]:
    """running → ready at a later time, the retry count raised.  New arguments replace all the old ones."""
    row = _end(
        conn, step_id, attempt, "ready", Outcome.RETRIED, error,
        extra=f"""retries = s.retries + 1, sends = 0, ready_at = {_NOW}, started_at = NULL,
                  args = coalesce(%(args)s, s.args), kwargs = coalesce(%(kwargs)s, s.kwargs),
                  input = CASE WHEN %(args)s IS NULL THEN s.input END, options = coalesce(%(options)s, s.options),
                  queue = coalesce(%(queue)s, s.queue),
                  run_at = coalesce(%(eta)s, {_NOW} + %(delay)s * interval '1 second'),
                  wake_at = coalesce(%(eta)s, {_NOW} + %(delay)s * interval '1 second')""",
        params={"args": args, "kwargs": kwargs, "queue": queue, "options": options, "delay": delay, "eta": eta},
    )  # fmt: skip
    if row is None:
        _refuse_unless_recorded(conn, step_id, attempt, Outcome.RETRIED)
        return []
    return _settle_returned(conn, row)


def hand_back(conn: Connection, step_id: str, attempt: int, *, delay: float = 0.0) -> list[Wakeup]:
    """running → ready, without blame: the worker shuts down or the run is paused."""
    row = _give_back(conn, step_id, attempt, Outcome.HANDED_BACK, None, delay=delay, preempted=0)
    if row is None:
        _refuse_unless_recorded(conn, step_id, attempt, Outcome.HANDED_BACK)
        return []
    return _settle_returned(conn, row)


def preempt(
    conn: Connection,
    worker_id: str,
    *,
    pid: int | None = None,
    reason: str,
    max_preemptions: int = MAX_PREEMPTIONS,
    limit: int = 200,
) -> list[Wakeup]:
    """running → ready for the steps of a worker (or of one of its pool processes) that is gone.

    A step that has lost its worker ``max_preemptions`` times before is failed instead.  Steps that somebody is
    writing just now, and those beyond ``limit``, are left for the next time: it waits for nobody.
    """
    rows = query(
        conn,
        f"""SELECT s.id, s.attempt, s.preemptions, {TRY_SHARE_RUN} AS free FROM byrd.steps s
            WHERE s.status = 'running' AND s.worker_id = %(worker)s AND (%(pid)s::int IS NULL OR s.pid = %(pid)s)
            ORDER BY s.run_id, s.no LIMIT %(limit)s FOR UPDATE SKIP LOCKED""",
        {"worker": worker_id, "pid": pid, "limit": limit},
    ).all()
    wakeups: list[Wakeup] = []
    for step_id, attempt, preemptions, free in rows:
        if not free:
            continue
        if preemptions >= max_preemptions:
            lost = preemptions + 1
            error = error_json("StepLostError", "byrd.errors", [f"lost its worker {lost} times; the last: {reason}"])
            ended = _end(conn, step_id, attempt, "failed", Outcome.PREEMPTED, error, extra=f"preemptions = {lost}")
            if ended is not None:
                wakeups += _after_failure(conn, ended)
            continue
        error = error_json("WorkerLostError", "billiard.exceptions", [reason])
        ended = _give_back(conn, step_id, attempt, Outcome.PREEMPTED, error, delay=0.0, preempted=1)
        if ended is not None:
            wakeups += _settle_returned(conn, ended)
    return wakeups


def revoke(conn: Connection, step_id: str, reason: str, *, attempt: int | None = None) -> list[Wakeup]:
    """ready, or running in ``attempt``, → cancelled: Celery's revoke, or the step expired before it started."""
    error = error_json("TaskRevokedError", "celery.exceptions", [reason])
    row = None
    if attempt is not None:
        row = _end(conn, step_id, attempt, "cancelled", Outcome.CANCELLED, error)
    if row is None:
        row = query(
            conn,
            f"""UPDATE byrd.steps s SET status = 'cancelled', error = %(error)s, finished_at = {_NOW}
                FROM {SHARE_RUN_OF_STEP} WHERE s.id = %(id)s AND s.status = 'ready' RETURNING {_ENDED}""",
            {"id": step_id, "error": error},
        ).first()
    return _after_failure(conn, row) if row is not None else []


def expire(conn: Connection, step_id: str) -> list[Wakeup]:
    """ready → cancelled when the step's time to start is over."""
    row = query(
        conn,
        f"""UPDATE byrd.steps s SET status = 'cancelled', error = %(error)s, finished_at = {_NOW}
            FROM {SHARE_RUN_OF_STEP}
            WHERE s.id = %(id)s AND s.status = 'ready' AND s.expires_at <= {_NOW} RETURNING {_ENDED}""",
        {"id": step_id, "error": error_json("TaskRevokedError", "celery.exceptions", ["expired"])},
    ).first()
    return _after_failure(conn, row) if row is not None else []


def ignore(conn: Connection, step_id: str, attempt: int, error: str) -> list[Wakeup]:
    """running → cancelled, without errbacks: the task raised Ignore, so it has no outcome for anyone to act on."""
    row = _end(conn, step_id, attempt, "cancelled", Outcome.CANCELLED, error)
    if row is None:
        _refuse_unless_recorded(conn, step_id, attempt, Outcome.CANCELLED)
        return []
    query(
        conn,
        f"""UPDATE byrd.steps SET status = 'skipped', finished_at = {_NOW}, cause = %(no)s
            WHERE run_id = %(run)s AND after = %(no)s AND on_failure AND status = 'pending' AND kind <> 'join'""",
        {"run": row.run_id, "no": row.no},
    )
    return _after_failure(conn, row)


def abandon(conn: Connection, step_id: str, attempt: int) -> list[Wakeup]:
    """running → cancelled at a checkpoint, because its run is being cancelled."""
    error = error_json("TaskRevokedError", "celery.exceptions", ["cancelled"])
    row = _end(conn, step_id, attempt, "cancelled", Outcome.CANCELLED, error)
    if row is None:
        _refuse_unless_recorded(conn, step_id, attempt, Outcome.CANCELLED)
        return []
    return _after_failure(conn, row)


def replace(conn: Connection, step_id: str, attempt: int, plan: Plan) -> list[Wakeup]:
    """running → pending: a canvas takes the step's place, and its value becomes the step's.

    ``plan`` may be numbered as it likes.  Raises :class:`StepCancelled` when the run is being cancelled.
    """
    run_id, first_no = _open_plan(conn, step_id)
    row = _end(
        conn, step_id, attempt, "pending", Outcome.REPLACED, None,
        extra="replaced = true, waiting = 1, started_at = NULL, ready_at = NULL, run_at = NULL, wake_at = NULL",
    )  # fmt: skip
    if row is None:
        _refuse_unless_recorded(conn, step_id, attempt, Outcome.REPLACED)
        return []
    plan = plans.renumbered(plan, first_no)
    plans.insert_steps(conn, run_id, plan.steps)
    query(
        conn,
        "UPDATE byrd.steps SET join_no = %(no)s, join_pos = 0 WHERE run_id = %(run)s AND no = %(output)s",
        {"run": run_id, "no": row.no, "output": plan.output},
    )
    return plans.start(conn, run_id, plan.steps)


def extend_join(conn: Connection, step_id: str, attempt: int, plan: Plan) -> list[Wakeup]:
    """Add a canvas to the group that the running step is a member of; its value comes last in the group's.

    Raises :class:`StepCancelled` when the run is being cancelled.
    """
    run_id, first_no = _open_plan(conn, step_id)
    check_owner(conn, step_id, attempt)
    output_id = next(step.id for step in plan.steps if step.no == plan.output)
    if query(conn, "SELECT 1 FROM byrd.steps WHERE id = %(id)s", {"id": output_id}).first():
        return []  # added before: the answer was lost on its way
    plan = plans.renumbered(plan, first_no)
    plans.insert_steps(conn, run_id, plan.steps)
    query(
        conn,
        """WITH joined AS (
             UPDATE byrd.steps j SET waiting = j.waiting + 1 FROM byrd.steps m
              WHERE m.id = %(id)s AND j.run_id = m.run_id AND j.no = m.join_no RETURNING j.run_id, j.no)
           UPDATE byrd.steps s SET join_no = joined.no, join_pos =
             (SELECT max(o.join_pos) + 1 FROM byrd.steps o WHERE o.run_id = joined.run_id AND o.join_no = joined.no)
             FROM joined WHERE s.run_id = joined.run_id AND s.no = %(output)s""",
        {"id": step_id, "output": plan.output},
    )
    return plans.start(conn, run_id, plan.steps)


def _open_plan(conn: Connection, step_id: str) -> tuple[str, int]:
    """Have the step's run to oneself, to add steps to it; return its id and the number of its next step."""
    found = query(conn, "SELECT run_id, kind FROM byrd.steps WHERE id = %(id)s", {"id": step_id}).first()
    if found is None:
        raise StaleAttempt(f"step {step_id} does not exist any more")
    if found.kind == StepKind.COMPENSATION:
        raise IllegalTransitionError(f"step {step_id} is a compensation, which can neither be replaced nor grow a chord")
    run_id = str(found.run_id)
    locks.own_run(conn, run_id)
    row = query(
        conn,
        """SELECT r.status, (SELECT max(no) + 1 FROM byrd.steps s WHERE s.run_id = r.id) AS next_no
           FROM byrd.runs r WHERE r.id = %(run)s""",
        {"run": run_id},
    ).one()
    if row.status == RunStatus.CANCELLING:
        # The new steps would never start, and the run would wait for them for ever.
        raise StepCancelled(f"step {step_id}: its run is being cancelled")
    return run_id, row.next_no


def check_owner(conn: Connection, step_id: str, attempt: int) -> None:
    """Raise :class:`StaleAttempt` unless ``attempt`` owns the running step; lock it for this transaction."""
    found = query(
        conn,
        "SELECT 1 FROM byrd.steps WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'running' FOR NO KEY UPDATE",
        {"id": step_id, "attempt": attempt},
    ).first()
    if found is None:
        raise StaleAttempt(f"step {step_id}: attempt {attempt} does not own it any more")


# -- what follows from an outcome ------------------------------------------------------------------


_RELEASE = f"""
UPDATE byrd.steps s
   SET status = 'ready', ready_at = {_NOW},
       run_at = coalesce(s.eta, {_NOW} + coalesce(s.countdown, 0) * interval '1 second'),
       wake_at = greatest(coalesce(s.eta, {_NOW} + coalesce(s.countdown, 0) * interval '1 second'),
                          {_NOW} + {RESEND_SECONDS} * interval '1 second'),
       sends = CASE WHEN s.eta IS NULL AND coalesce(s.countdown, 0) <= 0 THEN 1 ELSE 0 END,
       expires_at = coalesce({_NOW} + s.expires_in * interval '1 second', s.expires_at)
 WHERE s.run_id = %(run)s AND s.status = 'pending' AND s.kind <> 'join' AND NOT s.replaced
"""
_RELEASE_AFTER = f"{_RELEASE} AND s.after = %(no)s AND s.on_failure = %(failed)s RETURNING {WAKEUP}"
_RELEASE_ROOTS = f"{_RELEASE} AND s.no = ANY(%(numbers)s) RETURNING {WAKEUP}"


def release(conn: Connection, run_id: str, numbers: Iterable[int]) -> list[Wakeup]:
    """pending → ready for the steps whose predecessors are known to be done."""
    found = query(conn, _RELEASE_ROOTS, {"run": run_id, "numbers": list(numbers)})
    return _wakeups(found)


def advance(conn: Connection, run_id: str, no: int, join_no: int | None, *, succeeded: bool) -> list[Wakeup]:
    """Do all that follows from the outcome of step ``no``; return the steps that became ready."""
    wakeups: list[Wakeup] = []
    still_waiting = False
    done = deque([(no, join_no, succeeded)])
    while done:
        current, into, good = done.popleft()
        arrived: Counter[int] = Counter([into] if into is not None else [])
        if good:
            wakeups += _wakeups(query(conn, _RELEASE_AFTER, {"run": run_id, "no": current, "failed": False}))
            done.extend((n, j, True) for n, j in _finish_empty_joins(conn, run_id, current))
        else:
            wakeups += _wakeups(query(conn, _RELEASE_AFTER, {"run": run_id, "no": current, "failed": True}))
            arrived.update(_skip_after(conn, run_id, current))
        for join, count in sorted(arrived.items()):
            left = _arrive(conn, run_id, join, count)
            if left is None:
                continue  # the join was cancelled with its run, so this may be the run's last step
            if left.waiting > 0:
                still_waiting = True
                continue
            is_join = left.kind == "join"
            ok, next_join = finish_join(conn, run_id, join, is_join=is_join)
            done.append((join, next_join, ok))
            if not ok and is_join:
                done.extend((n, j, False) for n, j in _fail_bodies(conn, run_id, join))
    if not wakeups and not still_waiting:
        from byrd.store import runs  # noqa: PLC0415 - the two modules call each other

        wakeups += runs.finish_if_done(conn, run_id)
    return wakeups


def _finish_empty_joins(conn: Connection, run_id: str, no: int) -> list[tuple[int, int | None]]:
    """pending → succeeded for the empty groups after step ``no``: there is nothing that they wait for."""
    rows = query(
        conn,
        f"""UPDATE byrd.steps SET status = 'succeeded', result = '[]', finished_at = {_NOW}
            WHERE run_id = %(run)s AND after = %(no)s AND NOT on_failure AND kind = 'join' AND waiting = 0
              AND status = 'pending' RETURNING no, join_no""",
        {"run": run_id, "no": no},
    )
    return [(row.no, row.join_no) for row in rows]


def _skip_after(conn: Connection, run_id: str, no: int) -> Counter[int]:
    """pending → skipped for all that waited for the success of step ``no``; count what joins lose by it."""
    rows = query(
        conn,
        f"""WITH RECURSIVE down AS (
              SELECT no FROM byrd.steps
               WHERE run_id = %(run)s AND after = %(no)s AND NOT on_failure AND status = 'pending'
              UNION
              SELECT s.no FROM byrd.steps s JOIN down d ON s.after = d.no
               WHERE s.run_id = %(run)s AND s.status = 'pending')
            UPDATE byrd.steps s SET status = 'skipped', cause = %(no)s, finished_at = {_NOW}
              FROM down WHERE s.run_id = %(run)s AND s.no = down.no AND s.status = 'pending'
            RETURNING s.no, s.join_no""",
        {"run": run_id, "no": no},
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
        value = "'[' || coalesce(string_agg(m.result, ',' ORDER BY m.join_pos), '') || ']'" if is_join else "max(m.result)"
        done = query(
            conn,
            f"""UPDATE byrd.steps SET status = 'succeeded', finished_at = {_NOW}, result =
                  (SELECT {value} FROM byrd.steps m WHERE m.run_id = %(run)s AND m.join_no = %(join)s)
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
    """pending → failed with a ChordError for what follows a group one of whose members failed."""
    member = query(
        conn,
        """SELECT m.id, j.error FROM byrd.steps j JOIN byrd.steps m ON m.run_id = j.run_id AND m.no = j.cause
           WHERE j.run_id = %(run)s AND j.no = %(join)s""",
        {"run": run_id, "join": join},
    ).one()
    text = f"Dependency {member.id} raised {_repr_of(member.error)}"
    rows = query(
        conn,
        f"""UPDATE byrd.steps SET status = 'failed', error = %(error)s, cause = %(join)s, finished_at = {_NOW}
            WHERE run_id = %(run)s AND after = %(join)s AND NOT on_failure AND status = 'pending'
              AND (kind <> 'join' OR waiting = 0)
            RETURNING no, join_no""",
        {"run": run_id, "join": join, "error": error_json("ChordError", "celery.exceptions", [text])},
    )
    return [(row.no, row.join_no) for row in rows]


# -- the end of an attempt -------------------------------------------------------------------------

_ENDED = "s.id, s.run_id, s.no, s.kind, s.join_no, s.status"


def _end(
    conn: Connection,
    step_id: str,
    attempt: int,
    status: str,
    outcome: Outcome,
    error: str | None,
    *,
    extra: str = "",
    params: dict[str, Any] | None = None,
) -> Any:
    """Move a running step to ``status`` under the fence, and record how the attempt ended."""
    final = status in ("failed", "cancelled", "skipped")
    sets = [f"status = '{status}'", _UNCLAIMED, *([extra] if extra else [])]
    if final:
        sets += [f"finished_at = {_NOW}", "error = %(error)s"]
    return query(
        conn,
        f"""WITH old AS (
              SELECT o.id, o.attempt, o.started_at, (SELECT w.hostname FROM byrd.workers w WHERE w.id = o.worker_id) AS host
                FROM {SHARE_RUN_OF_STEP}, byrd.steps o
               WHERE o.id = %(id)s AND o.attempt = %(attempt)s AND o.status = 'running' FOR UPDATE OF o),
            ended AS (
              INSERT INTO byrd.attempts (step_id, attempt, outcome, error, worker, started_at)
              SELECT id, attempt, %(outcome)s, %(error)s, host, started_at FROM old ON CONFLICT DO NOTHING)
            UPDATE byrd.steps s SET {", ".join(sets)} FROM old
             WHERE s.id = old.id AND s.attempt = old.attempt AND s.status = 'running' RETURNING {_ENDED}""",
        {"id": step_id, "attempt": attempt, "outcome": outcome.value, "error": error, **(params or {})},
    ).first()


def _give_back(
    conn: Connection, step_id: str, attempt: int, outcome: Outcome, error: str | None, *, delay: float, preempted: int
) -> Any:
    return _end(
        conn, step_id, attempt, "ready", outcome, error,
        extra=f"""preemptions = s.preemptions + %(preempted)s, started_at = NULL, ready_at = {_NOW}, sends = 0,
                  run_at = {_NOW} + %(delay)s * interval '1 second', wake_at = {_NOW} + %(delay)s * interval '1 second'""",
        params={"preempted": preempted, "delay": delay},
    )  # fmt: skip


def _settle_returned(conn: Connection, row: Any) -> list[Wakeup]:
    """A step went back to ready: publish it, unless its run is being cancelled, which ends it here, or is paused."""
    run = query(conn, "SELECT status FROM byrd.runs WHERE id = %(run)s", {"run": row.run_id}).one()
    if run.status == RunStatus.CANCELLING:
        return revoke(conn, row.id, "cancelled")
    if run.status == RunStatus.PAUSED:
        query(conn, "UPDATE byrd.steps SET wake_at = 'infinity' WHERE id = %(id)s AND status = 'ready'", {"id": row.id})
        return []
    found = query(
        conn,
        f"""UPDATE byrd.steps s SET sends = 1, wake_at = greatest(s.run_at, {_NOW} + {RESEND_SECONDS} * interval '1 second')
            WHERE s.id = %(id)s AND s.status = 'ready' AND s.run_at <= {_NOW} RETURNING {WAKEUP}""",
        {"id": row.id},
    )
    return _wakeups(found)


def _after_failure(conn: Connection, row: Any) -> list[Wakeup]:
    if row.kind == "compensation":
        from byrd.store import runs  # noqa: PLC0415 - the two modules call each other

        runs.stick(conn, str(row.run_id), row.no)
        return []
    return advance(conn, str(row.run_id), row.no, row.join_no, succeeded=False)


def _refuse_unless_completed(conn: Connection, step_id: str, attempt: int) -> None:
    """Raise :class:`StaleAttempt`, unless this very attempt has completed the step."""
    row = query(conn, "SELECT status, attempt FROM byrd.steps WHERE id = %(id)s", {"id": step_id}).first()
    if row is None or row.attempt != attempt or row.status != StepStatus.SUCCEEDED:
        raise _stale(step_id, attempt, row)


def _refuse_unless_recorded(conn: Connection, step_id: str, attempt: int, outcome: Outcome) -> None:
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


def _wakeups(rows: Iterable[Any]) -> list[Wakeup]:
    return [Wakeup(row[0], str(row[1]), *row[2:]) for row in rows]


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
