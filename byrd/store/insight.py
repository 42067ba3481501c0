"""What people ask of the tables: how far a run is, what its steps wait for, what a set-up lacks.  Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection

from byrd.store import progress, reading, sweeps
from byrd.store.rows import Counts, RunRow, StepRow, WorkerRow, query

#: Of the items of an each, so many in each state are at hand for a drawing.
MOST_ITEMS = 20
#: A queue longer than this is as good as endless to those who wait in it.
_FAR = 10_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run with all that is known of it at one moment, by Postgres's clock."""

    run: RunRow
    now: datetime
    steps: list[StepRow]
    #: Of each each, by its number, how many items are in which state; ``steps`` may hold some of them only.
    items: Mapping[int, Mapping[str, int]]
    checkpoints: Mapping[int, list[tuple[str, Counts]]]
    attempts: list[dict[str, Any]]
    #: The node names of the workers that hold its steps, by worker id.
    holders: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class OpenStep:
    """A step that is ready, running or waiting, with its worker's lease and the end of its last attempt."""

    id: str
    no: int
    kind: str
    task: str
    queue: str
    #: It needs a message of its own.
    solo: bool
    status: str
    signal: str | None
    signal_of: str | None
    default: str | None
    compensates: int | None
    attempt: int
    retries: int
    preemptions: int
    sends: int
    due: bool
    run_at: datetime | None
    wake_at: datetime | None
    ready_at: datetime | None
    sent_at: datetime | None
    lost_at: datetime | None
    started_at: datetime | None
    expires_at: datetime | None
    #: JSON: its policies are in it.
    options: str
    start_by: datetime | None
    tried_since: datetime | None
    #: Of an attempt that runs: its last sign of life.
    alive_at: datetime | None
    limit_name: str | None
    limit_key: str | None
    limit_no: int | None
    limit_slot: datetime | None
    pid: int | None
    worker: str | None
    lease_until: datetime | None
    stopping: bool | None
    last_outcome: str | None
    last_error: str | None
    last_worker: str | None
    last_ended_at: datetime | None
    checkpoint_at: datetime | None
    completed: int | None
    failed: int | None


@dataclass(frozen=True, slots=True)
class Standing:
    """What a run waits for.  ``open_steps`` are the first of ``open_count``."""

    run: RunRow
    now: datetime
    open_steps: list[OpenStep]
    open_count: int
    workers: list[WorkerRow]
    #: The last event of each kind.
    events: Mapping[str, Event]


class Event(NamedTuple):
    """What happened to a run: when, and who asked for it, where that is known."""

    at: datetime
    by: str | None


class Failure(NamedTuple):
    """The step that made a run fail."""

    no: int
    kind: str
    task: str | None
    attempt: int
    retries: int
    error: str | None
    finished_at: datetime | None
    compensates: int | None


class Demand(NamedTuple):
    """Steps of one task that are due in one queue."""

    queue: str
    task: str
    steps: int
    since: datetime


class Tally(NamedTuple):
    """The steps of a run, counted by what has become of them; errbacks that were not called are left out."""

    total: int
    done: int
    running: int
    failed: int


class Items(NamedTuple):
    """What the checkpoints of a run have counted."""

    completed: int
    failed: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """A periodic task of django-celery-beat that submits a workflow, and the run that it submitted last."""

    name: str
    now: datetime
    enabled: bool
    one_off: bool
    args: str
    kwargs: str
    fired: int
    date_changed: datetime
    last_run_at: datetime | None
    start_time: datetime | None
    expires: datetime | None
    #: Of these four one is there: minute, hour, day of month, month, day of week; number and unit; date; event.
    crontab: list[str] | None
    timezone: str | None
    every: int | None
    period: str | None
    clocked: datetime | None
    solar: str | None
    run_id: str | None
    run_status: str | None
    switched: Switch | None


class Switch(NamedTuple):
    """Who paused, resumed or ``added`` a schedule last, as far as the admin's history has it."""

    by: str
    at: datetime
    added: bool


class ServerFacts(NamedTuple):
    """What the doctor asks Postgres."""

    version: str
    version_num: int
    standby: bool
    fsync: str
    synchronous_commit: str
    now: datetime


# -- one run ---------------------------------------------------------------------------------------


def snapshot(conn: Connection, run_id: str, *, every: bool = True) -> Snapshot:
    """Return a run with everything that ``byrd show`` draws; of an each's many items some, unless ``every`` one."""
    # One moment for all of it: a step must not be running in one query and done in the next.
    query(conn, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    rows = query(
        conn,
        """SELECT w.id, w.hostname FROM byrd.workers w WHERE w.id IN
             (SELECT s.worker_id FROM byrd.steps s WHERE s.run_id = %(run)s AND s.status = 'running')""",
        {"run": run_id},
    )
    return Snapshot(
        run=reading.get(conn, run_id),
        now=_now(conn),
        steps=reading.list_steps(conn, run_id, most_items=None if every else MOST_ITEMS),
        items=_count_items(conn, run_id),
        checkpoints=progress.list_checkpoints(conn, run_id),
        attempts=reading.attempts(conn, run_id),
        holders={str(row.id): row.hostname for row in rows},
    )


def _count_items(conn: Connection, run_id: str) -> dict[int, dict[str, int]]:
    """Return how many items of each each of a run are in which state."""
    rows = query(
        conn,
        """SELECT join_no, status, count(*) AS n FROM byrd.steps WHERE run_id = %(run)s AND kind = 'item'
            GROUP BY join_no, status""",
        {"run": run_id},
    )
    found: dict[int, dict[str, int]] = {}
    for row in rows:
        found.setdefault(row.join_no, {})[row.status] = int(row.n)
    return found


def standing(conn: Connection, run_id: str, *, limit: int = 2000) -> Standing:
    """Return what ``byrd why`` needs to know of a run."""
    query(conn, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
    run = reading.get(conn, run_id)
    rows = query(conn, _OPEN_STEPS, {"run": run_id, "limit": limit}).mappings()
    count = query(
        conn,
        "SELECT count(*) FROM byrd.steps WHERE run_id = %(run)s AND status IN ('ready','running','waiting')",
        {"run": run_id},
    ).scalar_one()
    events = query(
        conn,
        """SELECT DISTINCT ON (event) event, at, detail::json->>'by' AS by FROM byrd.events
            WHERE run_id = %(run)s ORDER BY event, id DESC""",
        {"run": run_id},
    )
    return Standing(
        run=run,
        now=_now(conn),
        open_steps=[OpenStep(**row) for row in rows],
        open_count=int(count),
        workers=list(sweeps.list_workers(conn)),
        events={row.event: Event(row.at, row.by) for row in events},
    )


#: 'infinity' is how a paused run's steps stay out of the relay's sight; it is no time to show to anybody.
_OPEN_STEPS = """
SELECT s.id, s.no, s.kind, s.task, coalesce(s.queue, '') AS queue, s.solo, s.status, s.signal, s.signal_of,
       CASE WHEN s.signal IS NOT NULL THEN s.fallback END AS default, s.compensates, s.attempt, s.retries,
       s.preemptions, s.sends, coalesce(s.run_at <= clock_timestamp(), false) AS due, s.run_at,
       nullif(s.wake_at, 'infinity') AS wake_at, s.ready_at, s.sent_at,
       s.lost_at, s.started_at, s.expires_at, s.options, s.start_by, s.tried_since,
       CASE WHEN s.status = 'running' THEN greatest(s.started_at, (SELECT max(h.updated_at) FROM byrd.checkpoints h
          WHERE h.step_id = s.id AND h.attempt = s.attempt)) END AS alive_at,
       s.limit_name, s.limit_key, s.limit_no, s.limit_slot, s.pid,
       w.hostname AS worker, w.lease_until, w.stopping,
       a.outcome AS last_outcome, a.error AS last_error, a.worker AS last_worker, a.ended_at AS last_ended_at,
       c.updated_at AS checkpoint_at, c.completed, c.failed
  FROM byrd.steps s
  LEFT JOIN byrd.workers w ON w.id = s.worker_id
  LEFT JOIN LATERAL (SELECT outcome, error, worker, ended_at FROM byrd.attempts a
                      WHERE a.step_id = s.id ORDER BY a.attempt DESC LIMIT 1) a ON true
  LEFT JOIN LATERAL (SELECT updated_at, completed, failed FROM byrd.checkpoints c
                      WHERE c.step_id = s.id AND c.name !~ '^(step|wait|beat):'
                      ORDER BY c.updated_at DESC LIMIT 1) c ON true
 WHERE s.run_id = %(run)s AND s.status IN ('ready','running','waiting')
 ORDER BY array_position(ARRAY['running','ready'], s.status), s.no LIMIT %(limit)s
"""


def failure_of(conn: Connection, run_id: str, *, compensation: bool = False) -> Failure | None:
    """Return the step whose failure came first: it caused the others.  Or the compensation that is stuck."""
    others = "kind NOT IN ('join', 'saga', 'item', 'errback', 'compensation')"
    kind = "kind = 'compensation'" if compensation else others
    row = query(
        conn,
        f"""SELECT no, kind, task, attempt, retries, error, finished_at, compensates FROM byrd.steps
            WHERE run_id = %(run)s AND status IN ('failed','cancelled') AND {kind}
            ORDER BY status <> 'failed', finished_at, no LIMIT 1""",
        {"run": run_id},
    ).first()
    return Failure._make(row) if row is not None else None


def compensations(conn: Connection, run_id: str, *, saga: int | None = None) -> tuple[int, int]:
    """Return how many of a run's compensations, or of one saga's in it, are done, and how many there are."""
    row = query(
        conn,
        """SELECT count(*) FILTER (WHERE status IN ('succeeded','skipped')) AS done, count(*) AS total FROM byrd.steps
           WHERE run_id = %(run)s AND kind = 'compensation' AND (%(saga)s::int IS NULL OR saga = %(saga)s)""",
        {"run": run_id, "saga": saga},
    ).one()
    return int(row.done), int(row.total)


def steps_before(conn: Connection, queue: str, ready_at: datetime) -> int:
    """Return how many due steps became ready in a queue before ``ready_at``; no more than 10,000 are counted."""
    found = query(
        conn,
        # One branch for each index.
        " UNION ALL ".join(
            f"""SELECT count(*) FROM (SELECT 1 FROM byrd.steps WHERE status = 'ready' AND sends > 0 AND {which}
                 AND queue = %(queue)s AND run_at <= clock_timestamp() AND wake_at < 'infinity'
                 AND ready_at < %(ready)s LIMIT %(far)s) before"""
            for which in ("solo", "NOT solo")
        ),
        {"queue": queue, "ready": ready_at, "far": _FAR},
    )
    return min(_FAR, sum(int(row[0]) for row in found))


def tallies(conn: Connection, run_ids: Sequence[str]) -> dict[str, Tally]:
    """Return the counts of steps of these runs."""
    rows = query(
        conn,
        """SELECT run_id, count(*) AS total,
                  count(*) FILTER (WHERE status IN ('succeeded','failed','skipped','cancelled')) AS done,
                  count(*) FILTER (WHERE status = 'running') AS running,
                  count(*) FILTER (WHERE status = 'failed') AS failed
             FROM byrd.steps WHERE run_id = ANY(%(runs)s::uuid[]) AND kind NOT IN ('join','saga')
              AND NOT (kind = 'errback' AND status IN ('pending','skipped')) GROUP BY run_id""",
        {"runs": list(run_ids)},
    )
    return {str(row.run_id): Tally(row.total, row.done, row.running, row.failed) for row in rows}


def items_of(conn: Connection, run_ids: Sequence[str]) -> dict[str, Items]:
    """Return what the checkpoints of these runs have counted, of those that have any."""
    rows = query(
        conn,
        """SELECT s.run_id, sum(c.completed)::bigint AS completed, sum(c.failed)::bigint AS failed
             FROM byrd.steps s JOIN byrd.checkpoints c ON c.step_id = s.id
            WHERE s.run_id = ANY(%(runs)s::uuid[]) AND c.name !~ '^(step|wait):' GROUP BY s.run_id""",
        {"runs": list(run_ids)},
    )
    return {str(row.run_id): Items(row.completed, row.failed) for row in rows}


# -- schedules: the tables of django-celery-beat, where they are in this database --------------------


def schedule(conn: Connection, name: str, *, task: str) -> Schedule | None:
    """Return the schedule of that name whose periodic task is ``task``; None when there is none, or no such table."""
    for schema in ("beat.", ""):  # that of the project in beat/, and that of a Django project of the user's own
        if query(conn, f"SELECT to_regclass('{schema}django_celery_beat_periodictask')").scalar() is None:
            continue
        row = query(conn, _SCHEDULE.format(schema=schema), {"name": name, "task": task}).mappings().first()
        if row is not None:
            run_id = row["run_id"] and str(row["run_id"])
            return Schedule(**{**row, "run_id": run_id}, switched=_switched(conn, name, schema))
    return None


def _switched(conn: Connection, name: str, schema: str) -> Switch | None:
    """Return who switched a schedule last; None where the admin is not installed, its users are of another kind, or
    their tables not ours to read.
    """
    tables = [f"{schema}{table}" for table in ("django_admin_log", "django_content_type", "auth_user")]
    readable = "SELECT bool_and(has_table_privilege(to_regclass(t), 'SELECT') IS TRUE) FROM unnest(%(tables)s) t"
    if not query(conn, readable, {"tables": tables}).scalar():
        return None
    row = query(conn, _SWITCHED.format(schema=schema), {"name": name}).first()
    return Switch._make(row) if row is not None else None


#: The scheduler notes when it has fired right after it has submitted the run, which bears the schedule's key.
_SCHEDULE = """
SELECT p.name, clock_timestamp() AS now, p.enabled, p.one_off, p.args, p.kwargs, p.total_run_count AS fired,
       p.date_changed, p.last_run_at, p.start_time, p.expires,
       CASE WHEN c.id IS NOT NULL
            THEN ARRAY[c.minute, c.hour, c.day_of_month, c.month_of_year, c.day_of_week]::text[] END AS crontab,
       c.timezone, i.every, i.period, k.clocked_time AS clocked, s.event AS solar, r.id AS run_id,
       r.status AS run_status
  FROM {schema}django_celery_beat_periodictask p
  LEFT JOIN {schema}django_celery_beat_crontabschedule c ON c.id = p.crontab_id
  LEFT JOIN {schema}django_celery_beat_intervalschedule i ON i.id = p.interval_id
  LEFT JOIN {schema}django_celery_beat_clockedschedule k ON k.id = p.clocked_id
  LEFT JOIN {schema}django_celery_beat_solarschedule s ON s.id = p.solar_id
  LEFT JOIN LATERAL (SELECT id, status FROM byrd.runs r WHERE starts_with(r.key, 'schedule:' || p.id || ':')
                        AND r.created_at BETWEEN p.last_run_at - interval '1 min' AND p.last_run_at + interval '1 min'
                      ORDER BY r.created_at DESC LIMIT 1) r ON true
 WHERE p.name = %(name)s AND p.task = %(task)s
"""
#: The history names the fields that were changed, but not their values.  What beat/ calls active, django-celery-beat
#: calls enabled; 1 stands for an addition, 2 for a change.
_SWITCHED = """
SELECT u.username, l.action_time, l.action_flag = 1
  FROM {schema}django_celery_beat_periodictask p
  JOIN {schema}django_admin_log l ON l.object_id = p.id::text
  JOIN {schema}django_content_type t ON t.id = l.content_type_id
   AND (t.app_label, t.model) IN (('beat', 'schedule'), ('django_celery_beat', 'periodictask'))
  JOIN {schema}auth_user u ON u.id = l.user_id
 WHERE p.name = %(name)s AND (l.action_flag = 1 OR l.action_flag = 2 AND l.change_message ~ '"(Active|Enabled)"')
 ORDER BY l.action_time DESC, l.id DESC LIMIT 1
"""


# -- the whole set-up ------------------------------------------------------------------------------


def demand(conn: Connection) -> list[Demand]:
    """Return what is due now, by queue and task; steps of runs that are paused wait for their operator, not here."""
    rows = query(
        conn,
        """SELECT s.queue, s.task, count(*) AS steps, min(s.run_at) AS since FROM byrd.steps s
           JOIN byrd.runs r ON r.id = s.run_id AND r.status IN ('running','compensating','cancelling')
           WHERE s.status = 'ready' AND s.wake_at < 'infinity' AND s.run_at <= clock_timestamp()
           GROUP BY s.queue, s.task ORDER BY s.queue, s.task""",
    )
    return [Demand(row.queue, row.task, row.steps, row.since) for row in rows]


def orphans(conn: Connection, *, seconds: float) -> int:
    """Return how many running steps belong to workers whose lease ended more than ``seconds`` ago."""
    found = query(
        conn,
        """SELECT count(*) FROM byrd.steps s LEFT JOIN byrd.workers w ON w.id = s.worker_id
           WHERE s.status = 'running'
             AND (w.id IS NULL OR w.lease_until < clock_timestamp() - %(seconds)s * interval '1 second')""",
        {"seconds": seconds},
    )
    return int(found.scalar_one())


def count_stuck(conn: Connection) -> int:
    """Return how many runs have a rollback that waits for an operator."""
    found = query(conn, "SELECT count(*) FROM byrd.runs WHERE status = 'rollback_stuck'")
    return int(found.scalar_one())


def stuck_rollbacks(conn: Connection, *, limit: int = 5) -> list[str]:
    """Return the ids of runs whose rollback waits for an operator, the oldest first."""
    rows = query(
        conn,
        """SELECT id FROM byrd.runs WHERE finished_at IS NULL AND status = 'rollback_stuck'
           ORDER BY created_at LIMIT %(limit)s""",
        {"limit": limit},
    )
    return [str(row.id) for row in rows]


def server_facts(conn: Connection) -> ServerFacts:
    """Return what is to know of the server itself."""
    row = query(
        conn,
        """SELECT current_setting('server_version'), current_setting('server_version_num')::int, pg_is_in_recovery(),
                  current_setting('fsync'), current_setting('synchronous_commit'), clock_timestamp()""",
    ).one()
    return ServerFacts._make(row)


def _now(conn: Connection) -> datetime:
    now: datetime = query(conn, "SELECT clock_timestamp()").scalar_one()
    return now
