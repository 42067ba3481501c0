"""The items of an each: how far they are, how they start, and what follows from their ends.

An each is a step that gives its slot back while its items are under way.  Its checkpoint says how far it is: the counts
of items that have succeeded and failed, where the next page begins, and which steps of the pages so far have not been
released yet.  So never more than a page of these, and ``limit``, wait in the tables.  Each item that ends releases
the next, in the same transaction, and calls the each once too few wait, or none is left.

Items end side by side, each with the row of the each locked after its own; whatever the each itself does, it does with
the run to itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from byrd.errors import StaleAttempt
from byrd.store import flow, runs
from byrd.store.flow import COMPLETED_AT, RESEND_SECONDS, error_json
from byrd.store.locks import SHARE_RUN_OF_STEP
from byrd.store.rows import UNCLAIMED, WAKEUP, Wakeup, query, wakeups_of

#: The checkpoint of an each.
CHECKPOINT = "items"
#: While an enumerator has more to come, a share is judged against the items so far, but never against fewer than this.
FLOOR = 100
_NOW = "clock_timestamp()"
_TOO_MANY_FAILED = error_json("TaskRevokedError", "celery.exceptions", ["too many other items of its each have failed"])
#: Why an item is revoked that has not ended before its each.
EACH_ENDED = "its each has ended"


@dataclass(slots=True)
class Items:
    """How far an each is.

    ``completed`` and ``failed``: those that have ended.  ``active``: those that are ready or running.  ``waiting``: the
    numbers of steps, from and to, that are not released yet, in order.  ``inserted``: how many items there are so far;
    ``total``: how many there will be, where that is known.  ``at``: the cursor of the next page.  ``reopen``: in
    another round, after a retry, the position after which items that failed are still to be tried again.
    ``round``: which attempts and retries it has seen.  ``over``: too many have failed.  ``done``: no page is left.
    """

    limit: int
    tolerate: int | float
    total: int | None
    round: list[int]
    inserted: int = 0
    active: int = 0
    waiting: list[list[int]] = field(default_factory=list)
    at: Any = None
    reopen: int | None = None
    over: bool = False
    completed: int = 0
    failed: int = 0
    done: bool = False

    @property
    def pending(self) -> int:
        """How many steps are not released yet."""
        return sum(to - first + 1 for first, to in self.waiting)

    @property
    def all(self) -> int:
        """How many items there are, as far as it is known."""
        return self.inserted if self.total is None else self.total

    @property
    def hungry(self) -> bool:
        """True when items are to be added: too few wait, and there are more."""
        return not self.over and (not self.done or self.reopen is not None) and self.pending <= self.limit

    @property
    def ended(self) -> bool:
        """True when nothing is under way, nor to come."""
        return self.active == 0 and (self.over or (self.pending == 0 and self.done and self.reopen is None))

    @property
    def due(self) -> bool:
        """True when its each has something to do."""
        return self.hungry or self.ended

    @property
    def tolerated(self) -> int:
        """How many items may fail, as far as it can be said by now."""
        if isinstance(self.tolerate, int):
            return self.tolerate
        so_far = self.inserted if self.done else max(self.inserted, FLOOR)
        return math.floor(self.tolerate * (so_far if self.total is None else self.total) + 1e-9)

    def take(self, most: int) -> list[int]:
        """Take the numbers of the next steps to be released, no more than this."""
        numbers: list[int] = []
        while self.waiting and len(numbers) < most:
            first, to = self.waiting[0]
            end = min(to, first + most - len(numbers) - 1)
            numbers += range(first, end + 1)
            if end == to:
                self.waiting.pop(0)
            else:
                self.waiting[0][0] = end + 1
        return numbers

    def add(self, numbers: Sequence[int]) -> None:
        """Have steps wait after those that do."""
        for no in numbers:
            if self.waiting and self.waiting[-1][1] == no - 1:
                self.waiting[-1][1] = no
            else:
                self.waiting.append([no, no])

    def to_json(self) -> str:
        """Return all but the counts."""
        kept = ("limit", "tolerate", "total", "round", "inserted", "active", "waiting", "at", "reopen", "over")
        return json.dumps({name: getattr(self, name) for name in kept})

    @classmethod
    def of(cls, cursor: str, completed: int, failed: int, done: bool) -> Items:  # noqa: FBT001 - the checkpoint's columns
        """From a checkpoint."""
        return cls(**json.loads(cursor), completed=completed, failed=failed, done=done)


def complete(
    conn: Connection, run_id: str, each_no: int, done: Mapping[str, tuple[int, str]]
) -> tuple[set[str], list[Wakeup]]:
    """running → succeeded for several items of one each, by their ids: the attempt, and the result (JSON).

    Returns the ids of those that are recorded so, and what became ready; the others are not these attempts' any more.
    """
    ids = sorted(done)
    params = {
        "id": ids[0], "ids": ids, "attempts": [done[id_][0] for id_ in ids], "results": [done[id_][1] for id_ in ids],
    }  # fmt: skip
    rows = query(
        conn,
        f"""UPDATE byrd.steps s SET status = 'succeeded', result = d.result, finished_at = {COMPLETED_AT}, {UNCLAIMED}
              FROM {SHARE_RUN_OF_STEP}, unnest(%(ids)s::text[], %(attempts)s::int[], %(results)s::text[])
                   AS d (id, attempt, result)
             WHERE s.id = d.id AND s.attempt = d.attempt AND s.status = 'running' RETURNING s.id, s.saga""",
        params,
    ).all()
    wakeups = ended(conn, run_id, each_no, succeeded=True, count=len(rows)) if rows else []
    if any(row.saga is not None for row in rows):
        flow.look_at_sagas(conn, run_id)
    before = (
        query(
            conn,
            """SELECT s.id FROM unnest(%(ids)s::text[], %(attempts)s::int[]) AS d (id, attempt)
             JOIN byrd.steps s ON s.id = d.id AND s.attempt = d.attempt AND s.status = 'succeeded'""",
            params,
        )
        if len(rows) < len(ids)
        else rows
    )
    return {row.id for row in before}, wakeups


def ended(conn: Connection, run_id: str, each_no: int, *, succeeded: bool, count: int = 1) -> list[Wakeup]:
    """So many items have ended: release the next, and call the each if it has something to do."""
    row = query(
        conn,
        """SELECT s.id, s.status, s.attempt, c.cursor, c.completed, c.failed, c.done FROM byrd.steps s
             JOIN byrd.checkpoints c ON c.step_id = s.id AND c.name = 'items'
            WHERE s.run_id = %(run)s AND s.no = %(no)s FOR NO KEY UPDATE OF s, c""",
        {"run": run_id, "no": each_no},
    ).first()
    if row is None or row.status not in ("ready", "running"):
        return runs.finish_if_done(conn, run_id)
    found = Items.of(row.cursor, row.completed, row.failed, row.done)
    found.active -= count
    if succeeded:
        found.completed += count
    else:
        found.failed += count
    wakeups = go_on(conn, run_id, each_no, row.id, None, found)
    if found.due:
        wakeups += _call(conn, row.id)
    return wakeups


def drop(conn: Connection, run_id: str, each_no: int) -> None:
    """pending, ready → cancelled for the items of an each that has ended without them; what runs goes on to its end."""
    query(
        conn,
        f"""UPDATE byrd.steps SET status = 'cancelled', error = %(error)s, cause = %(no)s, finished_at = {_NOW},
                   limit_slot = NULL
             WHERE run_id = %(run)s AND join_no = %(no)s AND kind = 'item' AND status IN ('pending','ready')""",
        {"run": run_id, "no": each_no, "error": error_json("TaskRevokedError", "celery.exceptions", [EACH_ENDED])},
    )


def wanted(conn: Connection, run_id: str, each_no: int) -> bool:
    """Tell whether an each goes on, so that an item of it may be tried again; if so, until this is committed."""
    row = query(
        conn,
        "SELECT status FROM byrd.steps WHERE run_id = %(run)s AND no = %(no)s FOR NO KEY UPDATE",
        {"run": run_id, "no": each_no},
    ).first()
    return row is not None and row.status in ("ready", "running")


def go_on(conn: Connection, run_id: str, no: int, step_id: str, attempt: int | None, found: Items) -> list[Wakeup]:
    """Release what may start now, unless too many have failed; save how far the each is."""
    wakeups: list[Wakeup] = []
    if not found.over and found.failed > found.tolerated:
        found.over, found.waiting = True, []
        found.active -= _stop(conn, run_id, no)
    elif not found.over:
        numbers = found.take(found.limit - found.active)
        if numbers:
            wakeups = flow.release(conn, run_id, numbers)
            found.active += len(wakeups)
    save(conn, step_id, attempt, found)
    return wakeups


def _stop(conn: Connection, run_id: str, no: int) -> int:
    """pending → skipped, ready → cancelled for the items that have not started; return how many were ready."""
    params = {"run": run_id, "no": no, "error": _TOO_MANY_FAILED}
    stopped = query(
        conn,
        f"""UPDATE byrd.steps SET status = CASE status WHEN 'ready' THEN 'cancelled' ELSE 'skipped' END,
                   error = CASE status WHEN 'ready' THEN %(error)s END, cause = %(no)s, finished_at = {_NOW},
                   limit_slot = NULL
             WHERE run_id = %(run)s AND join_no = %(no)s AND kind = 'item' AND status IN ('pending','ready')
            RETURNING status""",
        params,
    )
    return sum(row.status == "cancelled" for row in stopped)


def _call(conn: Connection, step_id: str) -> list[Wakeup]:
    """Have an each that was waiting for its items run again."""
    return wakeups_of(
        query(
            conn,
            f"""UPDATE byrd.steps s SET run_at = {_NOW}, sends = 1,
                       wake_at = {_NOW} + {RESEND_SECONDS} * interval '1 second'
                 WHERE s.id = %(id)s AND s.status = 'ready' AND s.run_at = 'infinity' RETURNING {WAKEUP}""",
            {"id": step_id},
        )
    )


# -- the checkpoint ------------------------------------------------------------------------------------


def load(conn: Connection, step_id: str) -> Items | None:
    """Return how far an each is; None before it has begun."""
    row = query(
        conn,
        "SELECT cursor, completed, failed, done FROM byrd.checkpoints WHERE step_id = %(id)s AND name = %(name)s",
        {"id": step_id, "name": CHECKPOINT},
    ).first()
    return Items.of(*row) if row is not None else None


def loaded(conn: Connection, step_id: str) -> Items:
    """Return how far an each is that has begun."""
    found = load(conn, step_id)
    if found is None:
        raise StaleAttempt(f"step {step_id}: it has no items")
    return found


def save(conn: Connection, step_id: str, attempt: int | None, found: Items) -> None:
    """Save how far an each is; the caller has its row locked, or its run to itself."""
    query(
        conn,
        """INSERT INTO byrd.checkpoints (step_id, name, attempt, cursor, completed, failed, done)
           VALUES (%(id)s, %(name)s, coalesce(%(attempt)s, 0), %(cursor)s, %(completed)s, %(failed)s, %(done)s)
           ON CONFLICT (step_id, name) DO UPDATE SET attempt = coalesce(%(attempt)s, byrd.checkpoints.attempt),
              cursor = excluded.cursor, completed = excluded.completed, failed = excluded.failed,
              done = excluded.done, updated_at = clock_timestamp()""",
        {
            "id": step_id, "name": CHECKPOINT, "attempt": attempt, "cursor": found.to_json(),
            "completed": found.completed, "failed": found.failed, "done": found.done,
        },
    )  # fmt: skip


def of_number(conn: Connection, run_id: str, no: int) -> Items | None:
    """Return how far the each is that is step ``no`` of a run; None before it has begun."""
    row = query(conn, "SELECT id FROM byrd.steps WHERE run_id = %(run)s AND no = %(no)s", {"run": run_id, "no": no})
    step_id = row.scalar()
    return load(conn, step_id) if step_id is not None else None
