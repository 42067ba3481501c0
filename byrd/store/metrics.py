"""The figures that a monitoring system asks for again and again.  Reads only, and only what is open.

What has ended is never looked at, so the cost is that of the work at hand, however many runs there have been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from byrd.model import RunStatus
from byrd.store.rows import query

#: The statuses of runs that have not ended.
OPEN_RUN = tuple(str(status) for status in RunStatus if not status.final)
#: The states in which steps are counted: ready with their time come, or not; those that are pending are left out.
STEP_STATES = ("due", "later", "running", "waiting")


class QueueMetrics(NamedTuple):
    """What is due in a queue: how many steps, and for how many seconds the oldest has been; 0.0 where there is none."""

    steps_due: int
    oldest_due_seconds: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """The figures of one moment, by Postgres's clock."""

    at: datetime
    #: Runs that have not ended, by status; each of :data:`OPEN_RUN` is there.
    runs: Mapping[str, int]
    #: Steps by where they stand: ``due`` and ``later`` are ready, now or when their time, their signal, their turn at a
    #: limit or the resume of their run has come; ``running``; ``waiting``.
    steps: Mapping[str, int]
    #: By queue: those that live workers consume, and those that have steps due.
    queues: Mapping[str, QueueMetrics]
    #: Workers whose lease lasts, and the processes, threads or greenlets in which these run steps.
    workers: int
    worker_processes: int
    #: Workers whose lease is over, or that are not on record any more, with steps that recovery has not taken back yet.
    workers_lost: int
    #: Notices of stuck rollbacks that were not delivered; all of them where no hook is set.
    notices_undelivered: int

    @property
    def rollbacks_stuck(self) -> int:
        """Runs with a rollback that waits for an operator."""
        return self.runs[RunStatus.ROLLBACK_STUCK]


#: Bad statistics must not lead to reading what has ended; and nobody wants a figure that is this late.
_SETTINGS = """
SET TRANSACTION READ ONLY; SET LOCAL enable_seqscan = off; SET LOCAL jit = off; SET LOCAL statement_timeout = '5s'
"""
#: By its row alone, without its run: the steps of a run that does not move are put out of sight ('infinity').
_DUE = """coalesce(wake_at < 'infinity' AND run_at <= now(), false) AND (limit_no IS NULL OR limit_slot IS NOT NULL)"""
#: One branch for each partial index; one statement, so that all of it is of one moment.
_READY = " UNION ALL ".join(
    f"SELECT coalesce(queue, '') AS queue, run_at, {_DUE} AS due FROM byrd.steps WHERE status = 'ready' AND {which}"
    for which in ("sends = 0", "sends > 0 AND solo", "sends > 0 AND NOT solo")
)
_FIGURES = f"""
WITH ready AS MATERIALIZED (SELECT queue, due, count(*) AS n, min(run_at) AS since FROM ({_READY}) r GROUP BY 1, 2)
SELECT 'at' AS figure, NULL AS label, 0::bigint AS n, now() AS time
UNION ALL SELECT 'due', queue, n, since FROM ready WHERE due
UNION ALL SELECT 'steps', 'later', sum(n)::bigint, NULL FROM ready WHERE NOT due HAVING count(*) > 0
UNION ALL SELECT 'steps', 'waiting', count(*), NULL FROM byrd.steps WHERE status = 'waiting'
UNION ALL SELECT 'steps', 'running', count(*), NULL FROM byrd.steps WHERE status = 'running'
UNION ALL SELECT 'lost', NULL, count(DISTINCT s.worker_id), NULL FROM byrd.steps s WHERE s.status = 'running'
             AND NOT EXISTS (SELECT 1 FROM byrd.workers w WHERE w.id = s.worker_id AND w.lease_until > now())
UNION ALL SELECT 'workers', NULL, count(*), NULL FROM byrd.workers WHERE lease_until > now()
UNION ALL SELECT 'processes', NULL, coalesce(sum(greatest(concurrency, 1)), 0), NULL FROM byrd.workers
           WHERE lease_until > now()
UNION ALL SELECT 'consumed', q.queue, 0, NULL FROM byrd.workers w, unnest(w.queues) AS q (queue)
           WHERE w.lease_until > now() AND NOT w.stopping
UNION ALL SELECT 'notices', NULL, count(*), NULL FROM byrd.notices WHERE delivered_at IS NULL
""" + "".join(
    f"UNION ALL SELECT 'runs', '{status}', count(*), NULL FROM byrd.runs WHERE status = '{status}'\n"
    for status in OPEN_RUN
)


def read(conn: Connection) -> Metrics:
    """Return the figures of now; five seconds is the longest that Postgres may take for them."""
    query(conn, _SETTINGS)
    rows = query(conn, _FIGURES).all()
    single = {row.figure: int(row.n) for row in rows if row.label is None}
    [now] = [row.time for row in rows if row.figure == "at"]
    queues = {row.label: QueueMetrics(0, 0.0) for row in rows if row.figure == "consumed"}
    for row in rows:
        if row.figure == "due":
            queues[row.label] = QueueMetrics(int(row.n), (now - row.time).total_seconds())
    steps = {row.label: int(row.n) for row in rows if row.figure == "steps"}
    steps["due"] = sum(queue.steps_due for queue in queues.values())
    return Metrics(
        at=now,
        runs={row.label: int(row.n) for row in rows if row.figure == "runs"},
        steps={state: steps.get(state, 0) for state in STEP_STATES},
        queues=dict(sorted(queues.items())),
        workers=single["workers"],
        worker_processes=single["processes"],
        workers_lost=single["lost"],
        notices_undelivered=single["notices"],
    )
