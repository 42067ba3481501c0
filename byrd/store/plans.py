"""Writes a plan: the run and all its steps, in the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from psycopg2.extras import execute_values
from sqlalchemy import Connection

from byrd.canvas import Plan, Step
from byrd.model import StepKind
from byrd.store import runs, steps
from byrd.store.rows import Wakeup, query


def submit(
    conn: Connection,
    run_id: str,
    plan: Plan,
    *,
    workflow: str | None,
    title: str,
    key: str | None,
    args: str | None,
    deadline_seconds: float | None,
) -> tuple[str, list[Wakeup]]:
    """Write a run with its steps; return its id and the steps to publish.

    With a ``key`` that a run of this workflow has already, nothing is written and that run's id is returned:
    the unique index decides, so two submits at once make one run.  Right when it is run twice: the run's own
    id is made by the caller.
    """
    row = query(
        conn,
        """INSERT INTO byrd.runs (id, workflow, title, key, args, output, deadline)
           VALUES (%(id)s, %(workflow)s, %(title)s, %(key)s, %(args)s, %(output)s,
                   clock_timestamp() + %(deadline)s * interval '1 second')
           ON CONFLICT DO NOTHING RETURNING id""",
        {
            "id": run_id, "workflow": workflow, "title": title, "key": key, "args": args, "output": plan.output,
            "deadline": deadline_seconds,
        },
    ).first()  # fmt: skip
    if row is None:
        return _existing(conn, run_id, workflow, key), []
    insert_steps(conn, run_id, plan.steps)
    runs.record(conn, run_id, "submitted", {"steps": len(plan.steps)})
    return run_id, start(conn, run_id, plan.steps)


def start(conn: Connection, run_id: str, planned: Sequence[Step]) -> list[Wakeup]:
    """Make ready the steps that wait for nothing, and finish the groups that are empty."""
    wakeups = steps.release(conn, run_id, [s.no for s in planned if s.after is None])
    for step in planned:
        if step.after is None and step.kind is StepKind.JOIN and step.members == 0:
            row = query(
                conn,
                """UPDATE byrd.steps SET status = 'succeeded', result = '[]', finished_at = clock_timestamp()
                   WHERE run_id = %(run)s AND no = %(no)s AND status = 'pending' RETURNING join_no""",
                {"run": run_id, "no": step.no},
            ).first()
            if row is not None:
                wakeups += steps.advance(conn, run_id, step.no, row.join_no, succeeded=True)
    return wakeups


def insert_steps(conn: Connection, run_id: str, planned: Sequence[Step]) -> None:
    """Insert steps, all pending."""
    cursor = conn.connection.cursor()
    try:
        execute_values(cursor, f"INSERT INTO byrd.steps ({', '.join(_COLUMNS)}) VALUES %s", [_row(run_id, s) for s in planned])
    finally:
        cursor.close()


_COLUMNS = (
    "id", "run_id", "no", "kind", "task", "queue", "args", "kwargs", "options", "compensation", "after", "on_failure",
    "input", "join_no", "join_pos", "waiting", "group_id", "countdown", "eta", "expires_in", "expires_at",
)  # fmt: skip


def _row(run_id: str, step: Step) -> tuple[Any, ...]:
    options: Mapping[str, Any] = step.options
    return (
        step.id, run_id, step.no, step.kind.value, step.task, step.queue, step.args, step.kwargs,
        json.dumps(dict(options)), step.compensation, step.after, step.on_failure, step.input, step.into,
        step.position, step.members, step.group_id, step.countdown, step.eta, step.expires_in, step.expires_at,
    )  # fmt: skip


def _existing(conn: Connection, run_id: str, workflow: str | None, key: str | None) -> str:
    row = query(
        conn,
        """SELECT id FROM byrd.runs WHERE id = %(id)s
           UNION ALL
           SELECT id FROM byrd.runs WHERE coalesce(workflow, '') = coalesce(%(workflow)s, '') AND key = %(key)s""",
        {"id": run_id, "workflow": workflow, "key": key},
    ).first()
    if row is None:  # the other submit was rolled back, or its run deleted, in between: the caller tries again
        raise RunVanishedError(run_id)
    return str(row.id)


class RunVanishedError(Exception):
    """The run that held the key went away between two statements; submit again."""

