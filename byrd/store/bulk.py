"""What one command does to many runs: those that match a filter, batch after batch, in the order of submission."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection

from byrd.errors import IllegalTransitionError, RunNotFoundError
from byrd.store import locks, progress, reading, steps
from byrd.store.rows import Counts, Wakeup, query

#: The workflow of the jobs themselves, on which none of them acts.
BULK = "byrd.bulk"
#: The checkpoint of a job.
CHECKPOINT = "runs"
#: A run's error without its traceback, which comes last.  As text, for a NUL in it Postgres would not read as JSON.
_SAID = """split_part(r.error, ', "traceback":', 1)"""
#: What is done to a run: ``act(conn, run_id)``.
Act = Callable[[Connection, str], list[Wakeup]]
_REFUSALS = (IllegalTransitionError, RunNotFoundError)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which runs: of one of the ``statuses``, submitted before a time, and so on."""

    statuses: tuple[str, ...]
    before: datetime
    after: datetime | None = None
    workflow: str | None = None
    #: A text in the run's error: its type, or a part of its message.
    error: str | None = None


class Progress(NamedTuple):
    """How far a job is: ``matched`` runs when it began, ``done`` and ``refused`` since then; the cursor."""

    matched: int
    done: int = 0
    refused: int = 0
    at: str | None = None
    run: str | None = None
    complete: bool = False

    @property
    def counts(self) -> Counts:
        """As a checkpoint."""
        cursor = {"of": self.matched, "skipped": self.refused, "at": self.at, "run": self.run}
        return Counts(json.dumps(cursor), self.done, 0, self.complete)

    @classmethod
    def of(cls, counts: Counts) -> Progress:
        """From a checkpoint."""
        cursor: dict[str, Any] = json.loads(counts.cursor or "{}")
        return cls(cursor["of"], counts.completed, cursor["skipped"], cursor["at"], cursor["run"], complete=counts.done)


def count(conn: Connection, found: Filter) -> int:
    """Return how many runs match now."""
    sql = " UNION ALL ".join(f"SELECT count(*) AS n FROM byrd.runs r WHERE {which}" for which in _branches(found))
    return int(query(conn, f"SELECT sum(n) FROM ({sql}) each_status", _params(found)).scalar_one())


def next_batch(
    conn: Connection, step_id: str, attempt: int, found: Filter, act: Act, *, limit: int
) -> tuple[Progress, list[Wakeup]]:
    """Act on the next runs that match, and save the checkpoint with it: each run is acted on once.

    One that has left the filter since it was found, or that refuses, is counted as such.
    """
    locks.own_batch(conn, step_id)
    counts = progress.load(conn, step_id, CHECKPOINT)
    so_far = Progress.of(counts) if counts is not None else Progress(count(conn, found))
    if so_far.complete:
        return so_far, []
    rows = query(conn, *matching_sql(found, so_far, limit)).all()
    locks.own_families(conn, [str(row.id) for row in rows])
    done, wakeups = _act_on(conn, _still_matching(conn, found, [row.id for row in rows]), act)
    so_far = so_far._replace(done=so_far.done + done, refused=so_far.refused + len(rows) - done)
    if rows:
        so_far = so_far._replace(at=rows[-1].created_at.isoformat(), run=str(rows[-1].id))
    so_far = so_far._replace(complete=len(rows) < limit)
    # The fence comes last: whoever must end this attempt meanwhile need not wait for the runs.
    steps.check_owner(conn, step_id, attempt)
    progress.save(conn, step_id, attempt, CHECKPOINT, so_far.counts)
    return so_far, wakeups


def submitted_at(conn: Connection, run_id: str) -> datetime:
    """Return when a job was submitted, by Postgres's clock: its filter's times go by that."""
    return reading.get(conn, run_id).created_at


def now(conn: Connection) -> datetime:
    """Return the time by Postgres's clock."""
    found: datetime = query(conn, "SELECT clock_timestamp()").scalar_one()
    return found


def matching_sql(found: Filter, so_far: Progress, limit: int) -> tuple[str, dict[str, Any]]:
    """Return the query for the next runs that match, with its parameters."""
    params = {**_params(found), "at": so_far.at, "run": so_far.run, "limit": limit}
    # The first of the two bounds is what the index finds.
    beyond = "AND r.created_at >= %(at)s::timestamptz AND (r.created_at, r.id) > (%(at)s::timestamptz, %(run)s::uuid)"
    sql = " UNION ALL ".join(
        f"""(SELECT r.id, r.created_at FROM byrd.runs r WHERE {which} {beyond if so_far.at else ""}
              ORDER BY r.created_at, r.id LIMIT %(limit)s)"""
        for which in _branches(found)
    )
    return f"SELECT * FROM ({sql}) found ORDER BY created_at, id LIMIT %(limit)s", params


def _act_on(conn: Connection, run_ids: list[str], act: Act) -> tuple[int, list[Wakeup]]:
    """Act on each of these runs; return how many have not refused, and what became ready."""
    try:
        with conn.begin_nested():
            return len(run_ids), [wakeup for run_id in run_ids for wakeup in act(conn, run_id)]
    except _REFUSALS:  # which is rare: those that do not are acted on again
        pass
    done, wakeups = 0, list[Wakeup]()
    for run_id in run_ids:
        with suppress(*_REFUSALS), conn.begin_nested():
            wakeups += act(conn, run_id)
            done += 1
    return done, wakeups


def _still_matching(conn: Connection, found: Filter, run_ids: list[str]) -> list[str]:
    rows = query(
        conn,
        """SELECT id FROM byrd.runs WHERE id = ANY(%(runs)s::uuid[]) AND status = ANY(%(statuses)s)
            ORDER BY id FOR NO KEY UPDATE""",
        {"runs": [str(run_id) for run_id in run_ids], "statuses": list(found.statuses)},
    )
    return [str(row.id) for row in rows]


def _branches(found: Filter) -> list[str]:
    """Return a condition for each status: with = ANY() the index on it would lose its order."""
    rest = [f"r.workflow IS DISTINCT FROM '{BULK}'", "r.created_at < %(before)s"]
    if found.after is not None:
        rest.append("r.created_at >= %(after)s")
    if found.workflow is not None:
        rest.append("r.workflow = %(workflow)s")
    if found.error is not None:
        rest.append(f"(strpos({_SAID}, %(error)s) > 0 OR strpos({_SAID}, %(escaped)s) > 0)")
    return [" AND ".join([f"r.status = %(status{n})s", *rest]) for n, _ in enumerate(found.statuses)]


def _params(found: Filter) -> dict[str, Any]:
    return {
        "before": found.before, "after": found.after, "workflow": found.workflow, "error": found.error,
        # An error is kept as JSON.
        "escaped": json.dumps(found.error)[1:-1] if found.error is not None else None,
        **{f"status{n}": status for n, status in enumerate(found.statuses)},
    }  # fmt: skip
