"""What the relay and recovery look for, and the workers' leases.  Each query reads only work that is due."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection

from byrd.errors import IllegalTransitionError
from byrd.store import limits, locks, runs, steps
from byrd.store.flow import MOVING, RESEND_SECONDS
from byrd.store.rows import WAKEUP, Consumers, Wakeup, WorkerRow, query, wakeups_of

_NOW = "clock_timestamp()"
#: A step that nobody has claimed this long after it was published is published again, later at ever longer intervals.
PATIENCE_SECONDS = 15.0
#: After it was published again and again, a step is looked at this seldom; that Redis lost all is noticed otherwise.
_LONGEST_PAUSE_SECONDS = 300.0
#: The same of a step whose message was in the queue when it was looked at last: it may be lost since.
_LONGEST_LOOK_SECONDS = 30.0
#: The longest pause of a step whose messages come to workers that cannot run it.
_PASS_ON_AT_MOST = 30.0
#: How many steps one statement of the relay writes, so that none takes long; what is left is due at once.
_BATCH = 100
#: The same for steps that are looked at again, each of which costs more: it is to be under 5 ms.
_OVERDUE_BATCH = 25
#: With more messages than this in a queue, it is not asked whether some of ours are missing; patience sees to these.
_COUNTED = 2000
#: When a step ``s`` that is published again now is looked at next.
_PAUSE = f"""now() + interval '1 second'
                       * least({_LONGEST_PAUSE_SECONDS}, {RESEND_SECONDS} * power(2, least(s.sends, 8)))"""
#: The queues that hold published steps, each with the time of its first: one look at the index per queue.
_QUEUES = """
    WITH RECURSIVE queues AS (
      (SELECT queue, wake_at FROM byrd.steps WHERE status = 'ready' AND sends > 0 AND {which}
        ORDER BY queue, wake_at LIMIT 1)
      UNION ALL
      SELECT following.queue, following.wake_at FROM queues q, LATERAL
        (SELECT queue, wake_at FROM byrd.steps WHERE status = 'ready' AND sends > 0 AND {which} AND queue > q.queue
          ORDER BY queue, wake_at LIMIT 1) following)"""
#: Steps that need a message of their own, and those that whoever is awake may take: each has its index.
_WHICH = {True: "solo", False: "NOT solo"}


class Late(NamedTuple):
    """A step that is to be looked at: its attempts so far, and the time at which it was to be looked at."""

    attempt: int
    wake_at: datetime


# -- the relay -------------------------------------------------------------------------------------


def take_due(conn: Connection, *, limit: int = _BATCH) -> list[Wakeup]:
    """Return ready steps that were never published and whose time has come; mark them as published."""
    if not locks.alone(conn, locks.RELAY):
        return []
    # MATERIALIZED: a subquery in FROM may be run once per row of a join, and then takes more than its LIMIT.
    rows = query(
        conn,
        f"""WITH due AS MATERIALIZED (
              SELECT d.id, r.status IN {MOVING} AS moving FROM byrd.steps d JOIN byrd.runs r ON r.id = d.run_id
               WHERE d.status = 'ready' AND d.wake_at <= now() AND d.sends = 0
               ORDER BY d.wake_at LIMIT %(limit)s FOR UPDATE OF d SKIP LOCKED)
            UPDATE byrd.steps s SET sends = s.sends + due.moving::int, wake_at = CASE WHEN due.moving
                     THEN now() + {RESEND_SECONDS} * interval '1 second' ELSE 'infinity'::timestamptz END
              FROM due WHERE s.id = due.id RETURNING {WAKEUP}, due.moving""",
        {"limit": limit},
    )
    return wakeups_of(row for row in rows if row.moving)


def overdue_queues(conn: Connection, *, solo: bool = True) -> dict[str, int]:
    """Return, for each queue with published steps that nobody has claimed in time, how many of them (at most 25).

    ``solo``: of those that need a message of their own, or of the others.
    """
    rows = query(
        conn,
        f"""{_QUEUES.format(which=_WHICH[solo])}
            SELECT q.queue, (SELECT count(*) FROM
                (SELECT 1 FROM byrd.steps s WHERE s.status = 'ready' AND s.sends > 0 AND {_WHICH[solo]}
                    AND s.queue = q.queue AND s.wake_at <= now() LIMIT {_OVERDUE_BATCH}) late) AS overdue
              FROM queues q WHERE q.wake_at <= now()""",
    )
    return {row.queue: row.overdue for row in rows}


def sent_and_waiting(conn: Connection, queue: str, *, solo: bool = True, at_most: int) -> int:
    """Return how many published steps of a queue are still ready, counting no further than ``at_most`` and 2,000."""
    found = query(
        conn,
        f"""SELECT count(*) FROM (SELECT 1 FROM byrd.steps WHERE status = 'ready' AND sends > 0 AND {_WHICH[solo]}
                                  AND queue = %(queue)s AND wake_at < 'infinity' LIMIT %(most)s) waiting""",
        {"queue": queue, "most": min(at_most, _COUNTED)},
    )
    return int(found.scalar_one())


def take_overdue(
    conn: Connection, queue: str, *, solo: bool = True, resend: int, limit: int = _OVERDUE_BATCH
) -> list[Wakeup]:
    """Return overdue steps of a queue to publish again; look at the others again later.

    Those are the first ``resend``, those whose messages were lost for certain (:func:`doubt_all`), and each that has
    waited long since it was last published, whatever else is in the queue: a queue that other messages fill, too, does
    not tell whether ours is among them.
    Pauses grow with each sending, and the number of sendings with the logarithm of a step's age, so that a queue that
    nobody consumes costs little here and in the broker.  A run that is paused costs nothing: 'infinity' takes its steps
    out of sight until it is resumed.
    """
    rows = query(
        conn,
        f"""WITH overdue AS MATERIALIZED (
              SELECT id, wake_at, ready_at, sends FROM byrd.steps
               WHERE status = 'ready' AND wake_at <= now() AND sends > 0 AND {_WHICH[solo]} AND queue = %(queue)s
               ORDER BY wake_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED),
            ranked AS (
              SELECT id, wake_at = ready_at AS lost,
                     row_number() OVER (ORDER BY wake_at) <= %(resend)s OR wake_at = ready_at
                         OR ready_at + power(2, least(sends - 1, 30)) * {PATIENCE_SECONDS} * interval '1 second' < now()
                         AS again
                FROM overdue)
            UPDATE byrd.steps s
               SET sends = s.sends + (o.again AND r.status IN {MOVING})::int,
                   sent_at = CASE WHEN o.again AND r.status IN {MOVING} THEN now() ELSE s.sent_at END,
                   lost_at = CASE WHEN o.lost AND r.status IN {MOVING} THEN now() ELSE s.lost_at END,
                   wake_at = CASE WHEN r.status NOT IN {MOVING} THEN 'infinity'::timestamptz
                     ELSE {_PAUSE} END
              FROM ranked o, byrd.runs r WHERE s.id = o.id AND r.id = s.run_id
            RETURNING {WAKEUP}, o.again AND r.status IN {MOVING} AS again""",
        {"queue": queue, "resend": resend, "limit": limit},
    )
    return wakeups_of(row for row in rows if row.again)


def late_steps(conn: Connection, queue: str, *, solo: bool = True, limit: int = _OVERDUE_BATCH) -> dict[str, Late]:
    """Return the steps of a queue that are to be looked at, the longest overdue first."""
    rows = query(
        conn,
        f"""SELECT id, attempt, wake_at FROM byrd.steps
             WHERE status = 'ready' AND sends > 0 AND {_WHICH[solo]} AND queue = %(queue)s AND wake_at <= now()
             ORDER BY wake_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED""",
        {"queue": queue, "limit": limit},
    )
    return {row.id: Late(row.attempt, row.wake_at) for row in rows}


def look_again(conn: Connection, late: Mapping[str, Late], missing: Sequence[str]) -> list[Wakeup]:
    """Return those late steps to publish again whose messages are ``missing``; look at the others again later.

    That is after half the time for which they have waited (4 to 30 s), so that a long line costs little.  A step that
    another relay has looked at since then, or that has moved, is left alone: what is known of its message is old.
    """
    rows = query(
        conn,
        f"""WITH late AS MATERIALIZED (
              SELECT d.id, d.id = ANY(%(missing)s) AS missing
                FROM unnest(%(late)s::text[], %(looks)s::timestamptz[]) AS l (id, wake_at)
                JOIN byrd.steps d ON d.id = l.id
               WHERE d.status || '' = 'ready' AND d.wake_at = l.wake_at AND d.wake_at <= now() AND d.sends > 0
               ORDER BY d.id FOR UPDATE OF d SKIP LOCKED)
            UPDATE byrd.steps s
               SET sends = s.sends + (l.missing AND r.status IN {MOVING})::int,
                   sent_at = CASE WHEN l.missing AND r.status IN {MOVING} THEN now() ELSE s.sent_at END,
                   lost_at = CASE WHEN l.missing AND r.status IN {MOVING} THEN now() ELSE s.lost_at END,
                   wake_at = CASE WHEN r.status NOT IN {MOVING} THEN 'infinity'::timestamptz
                     WHEN l.missing THEN {_PAUSE}
                     ELSE now() + least({_LONGEST_LOOK_SECONDS} * interval '1 second',
                                        greatest(2 * {RESEND_SECONDS} * interval '1 second',
                                                 (now() - greatest(s.ready_at, s.run_at)) / 2)) END
              FROM late l, byrd.runs r WHERE s.id = l.id AND r.id = s.run_id
            RETURNING {WAKEUP}, l.missing AND r.status IN {MOVING} AS again""",
        {"late": list(late), "looks": [found.wake_at for found in late.values()], "missing": list(missing)},
    )
    return wakeups_of(row for row in rows if row.again)


def not_sent(conn: Connection, step_ids: Sequence[str]) -> None:
    """Note that these steps, which were to be published again, were not, or not all: they are looked at soon."""
    query(
        conn,
        f"""WITH unsent AS MATERIALIZED (
              SELECT id FROM byrd.steps WHERE id = ANY(%(ids)s) AND status || '' = 'ready' AND sends > 1
               ORDER BY id FOR UPDATE SKIP LOCKED)
            UPDATE byrd.steps s SET sends = s.sends - 1, sent_at = NULL, lost_at = NULL,
                   wake_at = CASE WHEN s.wake_at < 'infinity' AND s.solo
                     THEN now() + {RESEND_SECONDS} * interval '1 second' ELSE s.wake_at END
              FROM unsent WHERE s.id = unsent.id""",
        {"ids": list(step_ids)},
    )


def take_oldest(conn: Connection, queue: str, *, limit: int) -> list[Wakeup]:
    """Return the oldest overdue steps of a queue that whoever is awake may take, to publish again.

    They keep their place in the line, which is in the order of their ``wake_at``: were they put off, as
    :func:`take_overdue` does, whatever becomes ready meanwhile would be taken before them, again and again.
    """
    rows = query(
        conn,
        f"""WITH oldest AS MATERIALIZED (
              SELECT d.id, r.status IN {MOVING} AS moving FROM byrd.steps d JOIN byrd.runs r ON r.id = d.run_id
               WHERE d.status = 'ready' AND d.wake_at <= now() AND d.sends > 0 AND NOT d.solo AND d.queue = %(queue)s
               ORDER BY d.wake_at LIMIT %(limit)s FOR UPDATE OF d SKIP LOCKED)
            UPDATE byrd.steps s SET sends = s.sends + o.moving::int,
                   sent_at = CASE WHEN o.moving THEN now() ELSE s.sent_at END,
                   wake_at = CASE WHEN o.moving THEN s.wake_at ELSE 'infinity'::timestamptz END
              FROM oldest o WHERE s.id = o.id RETURNING {WAKEUP}, o.moving""",
        {"queue": queue, "limit": limit},
    )
    return wakeups_of(row for row in rows if row.moving)


def pass_on(conn: Connection, step_id: str, attempt: int) -> list[Wakeup]:
    """Have a step sent again whose message came to a worker that cannot run it: soon, then less often as it ages.

    There is nothing to publish yet: the relay does it in its time.
    """
    query(
        conn,
        f"""UPDATE byrd.steps SET sends = 0, wake_at = {_NOW} + least({_PASS_ON_AT_MOST} * interval '1 second',
                   greatest(interval '1 second', ({_NOW} - ready_at) / 4))
            WHERE id = %(id)s AND attempt = %(attempt)s AND status = 'ready' AND sends > 0 AND wake_at < 'infinity'""",
        {"id": step_id, "attempt": attempt},
    )
    return []


def know_broker(conn: Connection, mark: str) -> None:
    """Note that the broker holds this mark."""
    query(conn, "INSERT INTO byrd.brokers (mark) VALUES (%(mark)s) ON CONFLICT DO NOTHING", {"mark": mark})


def knows_broker(conn: Connection, mark: str) -> bool:
    """Tell whether the broker was ever known to hold this mark."""
    return query(conn, "SELECT 1 FROM byrd.brokers WHERE mark = %(mark)s", {"mark": mark}).first() is not None


def doubt_all(conn: Connection) -> int:
    """Have the relay look now at all steps that were published and not claimed: the broker has lost its messages.

    Returns how many.  The oldest come first, for messages that were sent since then are there.
    """
    return sum(
        query(
            conn,
            f"""WITH waiting AS MATERIALIZED (
                  SELECT id FROM byrd.steps
                   WHERE status = 'ready' AND wake_at > now() AND wake_at < 'infinity' AND sends > 0 AND {which}
                   FOR UPDATE SKIP LOCKED)
                UPDATE byrd.steps s SET wake_at = s.ready_at FROM waiting w WHERE s.id = w.id""",
        ).rowcount
        for which in _WHICH.values()
    )


def seconds_until_due(conn: Connection, *, at_most: float, shared: bool = True) -> float:
    """Return how long nothing is due, for the relay to sleep; without ``shared``, nothing that has its own message."""
    kinds = _WHICH.values() if shared else [_WHICH[True]]
    published = [
        f"""({_QUEUES.format(which=which)}
                      SELECT min(wake_at) FROM queues WHERE wake_at < 'infinity')"""
        for which in kinds
    ]
    found = query(
        conn,
        f"""SELECT extract(epoch FROM least(
                (SELECT wake_at FROM byrd.steps WHERE status = 'ready' AND sends = 0 AND wake_at < 'infinity'
                  ORDER BY wake_at LIMIT 1), {", ".join(published)},
                (SELECT wake_at FROM byrd.steps WHERE status = 'waiting' AND wake_at < 'infinity'
                  ORDER BY wake_at LIMIT 1),
                (SELECT min(next_at) FROM byrd.limit_keys WHERE next_at IS NOT NULL)) - clock_timestamp())""",
    ).scalar()
    return at_most if found is None else max(0.0, min(at_most, float(found)))


# -- leases and recovery ---------------------------------------------------------------------------


def heartbeat(
    conn: Connection,
    worker_id: str,
    *,
    lease_seconds: float,
    hostname: str,
    pid: int,
    pool: str,
    concurrency: int,
    queues: Sequence[str],
    tasks: Sequence[str],
    version: str,
    shares: Sequence[str] = (),
) -> None:
    """Register a worker, or prolong its lease.  A worker that was given up comes back by the same statement."""
    row = query(
        conn,
        f"""UPDATE byrd.workers SET heartbeat_at = {_NOW}, lease_until = {_NOW} + %(lease)s * interval '1 second',
                   queues = %(queues)s, concurrency = %(concurrency)s, shares = %(shares)s::text[]
            WHERE id = %(id)s RETURNING id""",
        {
            "id": worker_id, "lease": lease_seconds, "queues": list(queues), "concurrency": concurrency,
            "shares": list(shares),
        },
    ).first()  # fmt: skip
    if row is not None:
        return
    query(
        conn,
        f"""INSERT INTO byrd.workers (id, hostname, pid, pool, concurrency, queues, tasks, shares, version,
                                      lease_until)
            VALUES (%(id)s, %(hostname)s, %(pid)s, %(pool)s, %(concurrency)s, %(queues)s, %(tasks)s,
                    %(shares)s::text[], %(version)s, {_NOW} + %(lease)s * interval '1 second')
            ON CONFLICT (id) DO NOTHING""",
        {
            "id": worker_id, "lease": lease_seconds, "hostname": hostname, "pid": pid, "pool": pool,
            "concurrency": concurrency, "queues": list(queues), "tasks": list(tasks), "shares": list(shares),
            "version": version,
        },
    )  # fmt: skip


def stop_worker(conn: Connection, worker_id: str) -> None:
    """Tell the worker's checkpoints to hand back; it claims nothing any more."""
    query(conn, "UPDATE byrd.workers SET stopping = true WHERE id = %(id)s", {"id": worker_id})


def release_worker(
    conn: Connection, worker_id: str, *, reason: str, max_preemptions: int = steps.MAX_PREEMPTIONS
) -> list[Wakeup]:
    """End a worker's lease; what it was running becomes ready at once."""
    # Both wait for the claims that are under way: what they claim is given back with the rest.
    locks.own_worker(conn, worker_id)
    query(conn, "SELECT 1 FROM byrd.workers WHERE id = %(id)s FOR UPDATE", {"id": worker_id})
    query(conn, f"UPDATE byrd.workers SET lease_until = {_NOW}, stopping = true WHERE id = %(id)s", {"id": worker_id})
    wakeups = steps.preempt(conn, worker_id, reason=reason, max_preemptions=max_preemptions, limit=1000)
    _forget_idle(conn, worker_id)
    return wakeups


def recover(conn: Connection, *, max_preemptions: int = steps.MAX_PREEMPTIONS) -> tuple[list[str], list[Wakeup]]:
    """Give up the workers whose lease is over: their running steps become ready again, by the same door as all.

    Returns the names of those workers, and the steps to publish.
    """
    if not locks.alone(conn, locks.RECOVERY):
        return [], []
    # Whoever claims something just now is left alone, and is not kept from renewing its lease.
    over = query(conn, "SELECT id FROM byrd.workers WHERE lease_until < now()").scalars().all()
    mine = [str(worker_id) for worker_id in over if locks.try_own_worker(conn, str(worker_id))]
    lost = query(
        conn,
        """SELECT id, hostname FROM byrd.workers WHERE id = ANY(%(ids)s::uuid[]) AND lease_until < now()
           FOR UPDATE SKIP LOCKED""",
        {"ids": mine},
    ).all()
    # Nobody deletes a worker that runs something, but an operator can.
    deleted = query(
        conn,
        """SELECT DISTINCT s.worker_id, 'deleted' FROM byrd.steps s WHERE s.status = 'running'
             AND NOT EXISTS (SELECT 1 FROM byrd.workers w WHERE w.id = s.worker_id)""",
    ).all()
    wakeups: list[Wakeup] = []
    for worker_id, hostname in (*lost, *deleted):
        reason = f"the lease of worker {hostname} ran out"
        wakeups += steps.preempt(conn, str(worker_id), reason=reason, max_preemptions=max_preemptions)
        _forget_idle(conn, str(worker_id))
    return [row.hostname for row in lost], wakeups


def _forget_idle(conn: Connection, worker_id: str) -> None:
    """Delete a worker that runs nothing; one that still does stays on record, for recovery to find what it runs."""
    query(
        conn,
        """DELETE FROM byrd.workers w WHERE w.id = %(id)s AND NOT EXISTS
             (SELECT 1 FROM byrd.steps s WHERE s.worker_id = w.id AND s.status = 'running')""",
        {"id": worker_id},
    )


def end_overdue_runs(conn: Connection, error: str) -> list[Wakeup]:
    """Cancel the runs whose deadline has passed; they will end as failed, with ``error`` (JSON)."""
    if not locks.alone(conn, locks.RECOVERY):
        return []
    rows = query(
        conn,
        """SELECT id FROM byrd.runs WHERE finished_at IS NULL AND deadline < now() AND status IN ('running','paused')
           ORDER BY deadline LIMIT 100""",
    ).all()
    run_ids = [str(row.id) for row in rows]
    locks.own_families(conn, run_ids)
    wakeups: list[Wakeup] = []
    for run_id in run_ids:
        with suppress(IllegalTransitionError):  # it has ended meanwhile
            wakeups += runs.cancel(conn, run_id, compensate=True, outcome="failed", error=error)
    return wakeups


def clock(conn: Connection) -> tuple[float, float, bool]:
    """Return the time by Postgres's clock, when it was started by that clock, and whether a heartbeat is yet to come.

    The times are seconds since 1970.  A heartbeat that is yet to come was written before the clock was set back.
    """
    row = query(
        conn,
        f"""SELECT extract(epoch FROM {_NOW}) AS now, extract(epoch FROM pg_postmaster_start_time()) AS started,
                   EXISTS (SELECT 1 FROM byrd.workers WHERE heartbeat_at > {_NOW}) AS behind""",
    ).one()
    return float(row.now), float(row.started), row.behind


def is_behind_history(conn: Connection) -> bool:
    """Tell whether the last event was recorded at a time yet to come: the clock was set back since then."""
    found = query(conn, f"SELECT at > {_NOW} FROM byrd.events ORDER BY id DESC LIMIT 1").scalar()
    return bool(found)


def follow_clock_back(conn: Connection) -> bool:
    """Set right what bears times to come, for Postgres's clock was set back: leases, and times to start by.

    Else nobody could give up a dead worker, claim a step that was ready, or send it again, until the clock has caught
    up.  A lease ends one lease from now, a delay or a sleep is as long as it was; an eta, and a run's deadline, mean a
    time of day and stay.  Returns False when another process is about to do it.
    """
    if not locks.alone(conn, locks.RECOVERY):
        return False
    query(
        conn,
        f"""UPDATE byrd.workers SET lease_until = {_NOW} + (lease_until - heartbeat_at), heartbeat_at = {_NOW}
            WHERE heartbeat_at > {_NOW}""",
    )
    query(
        conn,
        """WITH due AS MATERIALIZED (
             SELECT id, ready_at - now() AS ahead FROM byrd.steps
              WHERE status = 'ready' AND sends = 0 AND wake_at > now() AND ready_at > now() FOR NO KEY UPDATE),
           sent AS MATERIALIZED (
             SELECT id, ready_at - now() AS ahead FROM byrd.steps
              WHERE status = 'ready' AND sends > 0 AND solo AND wake_at > now() AND ready_at > now() FOR NO KEY UPDATE),
           shared AS MATERIALIZED (
             SELECT id, ready_at - now() AS ahead FROM byrd.steps
              WHERE status = 'ready' AND sends > 0 AND NOT solo AND wake_at > now() AND ready_at > now()
              FOR NO KEY UPDATE),
           waits AS MATERIALIZED (
             SELECT id, ready_at - now() AS ahead FROM byrd.steps
              WHERE status = 'waiting' AND wake_at > now() AND ready_at > now() FOR NO KEY UPDATE)
           UPDATE byrd.steps s SET ready_at = now(),
                  run_at = CASE WHEN s.run_at = s.eta THEN s.eta ELSE s.run_at - ahead END,
                  wake_at = CASE WHEN s.wake_at IN (s.eta, 'infinity') THEN s.wake_at ELSE s.wake_at - ahead END
             FROM (TABLE due UNION ALL TABLE sent UNION ALL TABLE shared UNION ALL TABLE waits)
                  early WHERE s.id = early.id""",
    )
    query(
        conn,
        """UPDATE byrd.steps SET started_at = now(), timeout_at = timeout_at - (started_at - now())
            WHERE timeout_at > now() AND status = 'running' AND started_at > now()""",
    )
    limits.follow_clock_back(conn)
    # A signal that came is no matter of time.
    query(
        conn,
        """UPDATE byrd.steps s SET wake_at = now() FROM byrd.signals g
            WHERE g.delivered_at IS NULL AND s.run_id = g.run_id AND s.signal = g.name AND s.status = 'waiting'
              AND s.wake_at > now()""",
    )
    return True


def postgres_uptime(conn: Connection) -> float:
    """Return for how many seconds this Postgres has been up."""
    return float(query(conn, "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())").scalar_one())


def list_workers(conn: Connection) -> list[WorkerRow]:
    """Return all registered workers."""
    rows = query(
        conn,
        f"""SELECT w.*, w.lease_until > {_NOW} AS alive,
                   (SELECT count(*) FROM byrd.steps s WHERE s.worker_id = w.id AND s.status = 'running') AS running
            FROM byrd.workers w ORDER BY w.hostname, w.started_at""",
    ).mappings()
    return [WorkerRow(**{**row, "id": str(row["id"])}) for row in rows]


def consumers(conn: Connection, queue: str) -> Consumers:
    """Return who consumes a queue: the workers whose lease lasts."""
    row = query(
        conn,
        f"""SELECT coalesce(sum(greatest(concurrency, 1)), 0) AS processes, count(*) AS workers,
                   coalesce(bool_and(shares <> '{{}}'), true) AS all_share
            FROM byrd.workers WHERE %(queue)s = ANY(queues) AND lease_until > {_NOW} AND NOT stopping""",
        {"queue": queue},
    ).one()
    return Consumers(int(row.processes), row.all_share, row.workers)


def running_here(conn: Connection, worker_id: str, step_id: str) -> Any:
    """Return the process (``pid``) and the ``attempt`` in which a worker runs a step; None when it does not."""
    return query(
        conn,
        "SELECT pid, attempt FROM byrd.steps WHERE id = %(id)s AND status = 'running' AND worker_id = %(worker)s",
        {"id": step_id, "worker": worker_id},
    ).first()


def make_solo(conn: Connection, queue: str, *, limit: int = _OVERDUE_BATCH) -> None:
    """Have steps of a queue sent by messages of their own that whoever is awake may take, but nobody does.

    No worker that consumes the queue shares their task, so they come to the front of the line, and stay there.  What
    waits for nothing but its turn is left alone: a message of its own would have to wait for all that are in the queue,
    and others would be taken meanwhile.
    """
    query(
        conn,
        f"""WITH consumers AS (SELECT shares FROM byrd.workers
                                WHERE %(queue)s = ANY(queues) AND lease_until > {_NOW} AND NOT stopping),
            late AS MATERIALIZED (
              SELECT d.id, d.task FROM byrd.steps d
               WHERE d.status = 'ready' AND d.sends > 0 AND NOT d.solo AND d.queue = %(queue)s
                 AND d.wake_at <= now() - {PATIENCE_SECONDS} * interval '1 second'
               ORDER BY d.wake_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
            UPDATE byrd.steps s SET solo = true, sends = 1, sent_at = NULL FROM late
             WHERE s.id = late.id AND s.status = 'ready' AND EXISTS (SELECT 1 FROM consumers)
               AND NOT EXISTS (SELECT 1 FROM consumers c WHERE late.task = ANY(c.shares))""",
        {"queue": queue, "limit": limit},
    )


def running_attempts(conn: Connection, worker_id: str) -> set[tuple[int, str, int]]:
    """Return (process, step, attempt) of what a worker runs without messages of its own."""
    rows = query(
        conn,
        "SELECT pid, id, attempt FROM byrd.steps WHERE worker_id = %(id)s AND status = 'running' AND NOT solo",
        {"id": worker_id},
    )
    return {(row.pid, row.id, row.attempt) for row in rows}


def running_pids(conn: Connection, worker_id: str) -> list[int]:
    """Return the processes in which a worker's steps are running."""
    rows = query(
        conn,
        "SELECT DISTINCT pid FROM byrd.steps WHERE worker_id = %(worker)s AND status = 'running' AND pid IS NOT NULL",
        {"worker": worker_id},
    )
    return [row.pid for row in rows]
