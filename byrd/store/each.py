"""What an each does while it runs: it adds its items to the run, a page at a time, and ends when they have.

Each of these has the run to itself, and is under the fence of the attempt that does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from byrd.canvas import Step
from byrd.model import Outcome, StepKind
from byrd.store import growth, items, locks, plans, runs, steps
from byrd.store.flow import COMPLETED_AT
from byrd.store.items import Items
from byrd.store.rows import CHANNEL, UNCLAIMED, Wakeup, query

_NOW = "clock_timestamp()"


def look(conn: Connection, step_id: str, attempt: int, *, limit: int, tolerate: float, total: int | None) -> Items:
    """Return how far an each is; begin it, or, when its run was retried or it has failed since, another round.

    Raises :class:`StepCancelled` when its run is being cancelled, or its saga has failed.
    """
    run_id, no = _own(conn, step_id, attempt)
    found = items.load(conn, step_id)
    seen = _seen(conn, run_id, step_id)
    if found is None:
        found = Items(limit, tolerate, total, seen, done=total == 0)
    elif found.round == seen:
        return found
    else:
        found = _another_round(conn, run_id, no, replace(found, round=seen))
    items.save(conn, step_id, attempt, found)
    return found


def insert(
    conn: Connection, step_id: str, attempt: int, new: Sequence[Step], *, inserted: int, at: Any, done: bool
) -> tuple[Items, list[Wakeup]]:
    """Add a page of items, after the first ``inserted``; ``at``: where the next page begins, unless it is ``done``.

    Returns how far the each is now, and what became ready.
    """
    run_id, no = _own(conn, step_id, attempt)
    found = items.loaded(conn, step_id)
    if found.inserted != inserted:
        return found, []  # added before: the answer was lost on its way
    saga, first_no = query(
        conn,
        """SELECT saga, (SELECT max(no) + 1 FROM byrd.steps WHERE run_id = %(run)s) FROM byrd.steps
            WHERE id = %(id)s""",
        {"run": run_id, "id": step_id},
    ).one()
    page = [
        replace(
            step, no=first_no + place, kind=StepKind.ITEM, into=no, position=inserted + place, saga=saga,
            solo=step.solo or saga is not None,
        )
        for place, step in enumerate(new)
    ]  # fmt: skip
    if page:
        plans.insert_steps(conn, run_id, page)
    found.add([step.no for step in page])
    found.inserted, found.at, found.done = inserted + len(page), at, done
    return found, items.go_on(conn, run_id, no, step_id, attempt, found)


def reopen(conn: Connection, step_id: str, attempt: int, *, most: int) -> tuple[Items, list[Wakeup]]:
    """failed, skipped or cancelled → pending for the next items that are to be tried again; as :func:`insert`."""
    run_id, no = _own(conn, step_id, attempt)
    found = items.loaded(conn, step_id)
    if found.reopen is None:
        return found, []
    left = query(
        conn,
        """SELECT no, join_pos FROM byrd.steps WHERE run_id = %(run)s AND join_no = %(no)s AND kind = 'item'
             AND status IN ('failed','skipped','cancelled') AND join_pos > %(after)s
            ORDER BY join_pos LIMIT %(most)s""",
        {"run": run_id, "no": no, "after": found.reopen, "most": most},
    ).all()
    which = "no = ANY(%(numbers)s) AND status IN ('failed','skipped','cancelled')"
    runs.reopen(conn, run_id, which, {"numbers": [row.no for row in left]})
    found.add([row.no for row in left])
    found.reopen = left[-1].join_pos if len(left) == most else None
    return found, items.go_on(conn, run_id, no, step_id, attempt, found)


def park(conn: Connection, step_id: str, attempt: int) -> list[Wakeup]:
    """running → ready when its items call it: when too few wait, or none is left.

    A page that came in costs it neither the retries nor the workers that it had lost before.
    """
    locks.own_run_of(conn, step_id)
    wakeups = steps.hand_back(conn, step_id, attempt, delay=1e9)
    found = items.loaded(conn, step_id)
    query(
        conn,
        f"""UPDATE byrd.steps s SET run_at = at.time, retries = 0, preemptions = 0,
                   wake_at = CASE WHEN s.wake_at = 'infinity' THEN s.wake_at ELSE at.time END
              FROM (SELECT CASE WHEN %(due)s THEN {_NOW} ELSE 'infinity'::timestamptz END AS time) at
             WHERE s.id = %(id)s AND s.status = 'ready' AND s.attempt = %(attempt)s AND s.sends = 0""",
        {"id": step_id, "attempt": attempt, "due": found.due},
    )
    if found.due:
        query(conn, f"NOTIFY {CHANNEL}")
    return wakeups


def finish(conn: Connection, step_id: str, attempt: int, *, results: bool) -> list[Wakeup]:
    """running → succeeded with the values of its items in order, null for those that failed, or their number."""
    value = (
        """(SELECT '[' || coalesce(string_agg(coalesce(m.result, 'null'), ',' ORDER BY m.join_pos), '') || ']'
              FROM byrd.steps m WHERE m.run_id = s.run_id AND m.join_no = s.no AND m.kind = 'item')"""
        if results
        else """(SELECT json_build_object('items', c.completed + c.failed, 'failed', c.failed)::text
                  FROM byrd.checkpoints c WHERE c.step_id = s.id AND c.name = 'items')"""
    )
    row = query(
        conn,
        f"""UPDATE byrd.steps s SET status = 'succeeded', result = {value}, finished_at = greatest({COMPLETED_AT},
                     (SELECT max(m.finished_at) FROM byrd.steps m WHERE m.run_id = s.run_id AND m.join_no = s.no)),
                   {UNCLAIMED}
              FROM {locks.SHARE_RUN_OF_STEP}
             WHERE s.id = %(id)s AND s.attempt = %(attempt)s AND s.status = 'running'
            RETURNING s.run_id, s.no, s.join_no, s.kind, s.saga, s.mark""",
        {"id": step_id, "attempt": attempt},
    ).first()
    return steps.after_success(conn, step_id, attempt, row)


def size_of_values(conn: Connection, step_id: str) -> int:
    """Return how many bytes the values of an each's items have together, as JSON."""
    found = query(
        conn,
        """SELECT coalesce(sum(coalesce(octet_length(m.result), 4) + 1), 0) + 1 FROM byrd.steps s
             JOIN byrd.steps m ON m.run_id = s.run_id AND m.join_no = s.no AND m.kind = 'item'
            WHERE s.id = %(id)s""",
        {"id": step_id},
    )
    return int(found.scalar_one())


def first_failure(conn: Connection, step_id: str) -> tuple[int, str | None]:
    """Return the number and the error (JSON) of the item that failed first."""
    row = query(
        conn,
        """SELECT m.no, m.error FROM byrd.steps s
             JOIN byrd.steps m ON m.run_id = s.run_id AND m.join_no = s.no AND m.kind = 'item'
            WHERE s.id = %(id)s AND m.status IN ('failed','cancelled') AND m.cause IS NULL
            ORDER BY m.status <> 'failed', m.finished_at, m.no LIMIT 1""",
        {"id": step_id},
    ).first()
    return (row.no, row.error) if row is not None else (0, None)


def _own(conn: Connection, step_id: str, attempt: int) -> tuple[str, int]:
    """Have the run of an each to oneself, under the fence; return its id, and the number of the each."""
    run_id, _ = growth.open_plan(conn, step_id)
    steps.check_owner(conn, step_id, attempt)
    no: int = query(conn, "SELECT no FROM byrd.steps WHERE id = %(id)s", {"id": step_id}).scalar_one()
    return run_id, no


def _seen(conn: Connection, run_id: str, step_id: str) -> list[int]:
    """Return the last attempt that failed, and the last retry of the run: after either, another round begins."""
    row = query(
        conn,
        f"""SELECT coalesce((SELECT max(a.attempt) FROM byrd.attempts a
                             WHERE a.step_id = %(id)s AND a.outcome = '{Outcome.FAILED}'), 0),
                   coalesce((SELECT max(e.id) FROM byrd.events e
                             WHERE e.run_id = %(run)s AND e.event = 'retried'), 0)""",
        {"id": step_id, "run": run_id},
    ).one()
    return [int(row[0]), int(row[1])]


def _another_round(conn: Connection, run_id: str, no: int, found: Items) -> Items:
    """Count anew: what has succeeded stays, what has not is to be tried again."""
    params = {"run": run_id, "no": no}
    counted = query(
        conn,
        """SELECT count(*) FILTER (WHERE status = 'succeeded') AS completed,
                  count(*) FILTER (WHERE status IN ('ready','running')) AS active,
                  count(*) FILTER (WHERE status IN ('failed','skipped','cancelled')) AS left
             FROM byrd.steps WHERE run_id = %(run)s AND join_no = %(no)s AND kind = 'item'""",
        params,
    ).one()
    pending = query(
        conn,
        """SELECT no FROM byrd.steps WHERE run_id = %(run)s AND join_no = %(no)s AND kind = 'item'
              AND status = 'pending' ORDER BY join_pos""",
        params,
    )
    found = replace(
        found, completed=counted.completed, failed=0, active=counted.active, waiting=[], over=False,
        reopen=-1 if counted.left else None,
    )  # fmt: skip
    found.add([row.no for row in pending])
    return found
