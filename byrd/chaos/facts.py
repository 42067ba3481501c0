"""What the tables say of a session's runs, read in one snapshot; what to make of it is the audit's business."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from byrd.chaos.faults import Hit
from byrd.chaos.report import Finding
from byrd.chaos.submitter import Submission
from byrd.store.invariants import Broken, broken_rows
from byrd.store.rows import query

FINAL = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A run, and how many of its compensations have succeeded."""

    id: str
    status: str
    result: str | None
    error: str | None
    undone: int


@dataclass(frozen=True, slots=True)
class End:
    """How an attempt ended that did not complete its step; ``worker`` is a node name."""

    outcome: str
    error: str | None
    worker: str | None
    at: datetime


@dataclass(frozen=True, slots=True)
class Place:
    """Where an attempt ran: in which life of which worker, in which process."""

    worker_id: str
    pid: int | None


@dataclass(slots=True)
class Facts:
    """All that was read."""

    runs: dict[str, RunFacts] = field(default_factory=dict)
    #: The rows of the steps that run something, by id.
    steps: dict[str, Any] = field(default_factory=dict)
    starts: dict[Hit, datetime] = field(default_factory=dict)
    ends: dict[Hit, End] = field(default_factory=dict)
    #: How many effects each attempt left.
    effects: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    #: Where each attempt ran that left an effect.
    places: dict[Hit, Place] = field(default_factory=dict)
    #: When each run was first paused, of those that were.
    pauses: dict[str, datetime] = field(default_factory=dict)
    twice: list[Finding] = field(default_factory=list)
    #: What attempts have written after their end.
    late: list[Finding] = field(default_factory=list)
    #: How many items each step has written, and how many different ones.
    items: dict[str, tuple[int, int]] = field(default_factory=dict)

    def recorded(self, hit: Hit) -> datetime | None:
        """Return when an attempt had its outcome on record: its step's completion, or its own end; None before that."""
        end, step = self.ends.get(hit), self.steps.get(hit[0])
        if end is not None:
            return end.at
        found: datetime | None = step.finished_at if step is not None and step.attempt == hit[1] else None
        return found


def ids_by_key(conn: Connection, unsure: Sequence[Submission]) -> dict[str, str]:
    """Return the runs, by their keys, that submissions have left though they raised."""
    rows = query(
        conn,
        "SELECT id, key FROM byrd.runs WHERE coalesce(workflow, '') = ANY(%(workflows)s) AND key = ANY(%(keys)s)",
        {"workflows": sorted({s.shape.workflow for s in unsure}), "keys": [s.key for s in unsure]},
    )
    return {row.key: str(row.id) for row in rows}


def open_runs(conn: Connection, submissions: Sequence[Submission]) -> int:
    """Return how many of the session's runs have not ended yet."""
    ids = [s.run_id for s in submissions if s.run_id] + list(
        ids_by_key(conn, [s for s in submissions if s.run_id is None]).values()
    )
    found = query(
        conn,
        "SELECT count(*) FROM byrd.runs WHERE id = ANY(%(runs)s::uuid[]) AND NOT status = ANY(%(final)s)",
        {"runs": ids, "final": sorted(FINAL)},
    )
    return int(found.scalar_one())


def broken(conn: Connection) -> list[Broken]:
    """Return the rows that break an invariant of Byrd's tables, whosever they are: a fault hits more than the load."""
    query(conn, "SET LOCAL statement_timeout = 0")  # it reads all tables: a large database may take its time
    return broken_rows(conn)


def read(conn: Connection, run_ids: Sequence[str]) -> Facts:
    """Read what became of the runs."""
    query(conn, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    facts, params = Facts(), {"runs": list(run_ids)}
    for row in query(conn, _RUNS, params):
        facts.runs[str(row.id)] = RunFacts(str(row.id), row.status, row.result, row.error, int(row.undone))
    for row in query(conn, _STEPS, params):
        facts.steps[row.id] = row
        if row.started_at is not None:
            facts.starts[row.id, row.attempt] = row.started_at
    for row in query(conn, _ENDS, params):
        facts.ends[row.step_id, row.attempt] = End(row.outcome, row.error, row.worker, row.ended_at)
        if row.started_at is not None:
            facts.starts[row.step_id, row.attempt] = row.started_at
    for row in query(conn, _EFFECTS, params):
        facts.effects[row.step_id][row.attempt] = row.effects
        if row.worker_id is not None:
            facts.places[row.step_id, row.attempt] = Place(row.worker_id, row.pid)
    for row in query(conn, _ITEMS, params):
        facts.items[row.step_id] = (row.written, row.items)
    facts.pauses = {row.run_id: row.at for row in query(conn, _PAUSES, params)}
    facts.twice = [Finding(str(row.run_id), row.step_id, row.what) for row in query(conn, _TWICE, params)]
    facts.late = [Finding(str(row.run_id), row.step_id, row.what) for row in query(conn, _LATE, params)]
    return facts


_RUNS = """
SELECT r.id, r.status, o.result, r.error, (SELECT count(*) FROM byrd.steps c WHERE c.run_id = r.id
         AND c.kind = 'compensation' AND c.status = 'succeeded') AS undone
  FROM byrd.runs r LEFT JOIN byrd.steps o ON o.run_id = r.id AND o.no = r.output
 WHERE r.id = ANY(%(runs)s::uuid[])
"""
_STEPS = """
SELECT id, run_id::text, task, attempt, status, replaced, result, started_at, finished_at FROM byrd.steps
 WHERE run_id = ANY(%(runs)s::uuid[]) AND kind <> 'join'
"""
_ENDS = """
SELECT a.* FROM byrd.attempts a JOIN byrd.steps s ON s.id = a.step_id WHERE s.run_id = ANY(%(runs)s::uuid[])
"""
_EFFECTS = """
SELECT step_id, attempt, count(*) AS effects, min(worker_id::text) AS worker_id, min(pid) AS pid
  FROM byrd_chaos.effects WHERE run_id = ANY(%(runs)s::uuid[]) GROUP BY step_id, attempt ORDER BY step_id, attempt
"""
_ITEMS = """
SELECT step_id, count(*) AS written, count(DISTINCT item) AS items FROM byrd_chaos.items
 WHERE run_id = ANY(%(runs)s::uuid[]) GROUP BY step_id
"""
_PAUSES = """
SELECT run_id::text, min(at) AS at FROM byrd.events WHERE run_id = ANY(%(runs)s::uuid[]) AND event = 'paused'
 GROUP BY run_id
"""
_TWICE = """
SELECT run_id, step_id, count(*) || ' completions were recorded' AS what FROM byrd_chaos.completions
 WHERE run_id = ANY(%(runs)s::uuid[]) GROUP BY run_id, step_id HAVING count(*) > 1
UNION ALL
SELECT s.run_id, s.id, 'attempt ' || a.attempt || ' ended as ' || a.outcome || ', and completed the step'
  FROM byrd.steps s
  JOIN byrd.attempts a ON a.step_id = s.id AND a.attempt >= s.attempt
 WHERE s.run_id = ANY(%(runs)s::uuid[]) AND s.status = 'succeeded' AND NOT s.replaced
UNION ALL
SELECT e.run_id, NULL, count(*) || ' ends of the run were recorded' FROM byrd.events e
 WHERE e.run_id = ANY(%(runs)s::uuid[]) AND e.event IN ('succeeded', 'failed', 'cancelled')
 GROUP BY e.run_id HAVING count(*) > 1
UNION ALL
SELECT i.run_id, i.step_id, 'item ' || i.item || ' was committed ' || count(*) || ' times' FROM byrd_chaos.items i
 WHERE i.run_id = ANY(%(runs)s::uuid[]) GROUP BY i.run_id, i.step_id, i.item HAVING count(*) > 1
"""
_LATE = """
SELECT i.run_id, i.step_id,
       'item ' || i.item || ' was committed by attempt ' || i.attempt || ' after it had ended as ' || a.outcome AS what
  FROM byrd_chaos.items i
  JOIN byrd.attempts a ON a.step_id = i.step_id AND a.attempt = i.attempt AND a.ended_at < i.at
 WHERE i.run_id = ANY(%(runs)s::uuid[])
"""
