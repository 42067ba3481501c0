"""How a rollback is planned, and how it goes on: what is undone, and which compensation waits for which.

The compensations of a rollback have *ranks*.  Those of one rank undo steps of which none came before another in the
plan, members of a group say, and may run side by side; those of a higher rank wait for all of the lower ones.  So of
two steps that followed one another the later is always undone first.

A rollback is that of the run, or of a saga in it (``saga``: the number of its step), and covers all sagas inside it.
A workflow within the run is undone by the rollback of its own run, which a compensation of its step sees to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from graphlib import TopologicalSorter
from typing import Any, NamedTuple

from sqlalchemy import Connection

from byrd.store import flow
from byrd.store.rows import Wakeup, query
from byrd.waits import SUBWORKFLOW, UNDO_SUBWORKFLOW

#: The end ``a`` of an attempt leaves open whether it took effect: its worker was lost, or it was told to stop, or its
#: time was over, or it gave the step back before its end.  One that raised, to be tried again or not, does not.
_UNKNOWN = """(a.outcome IN ('preempted','handed_back')
    OR (a.outcome = 'cancelled' AND a.error::json->>'exc_type' <> 'Ignore')
    OR a.error::json->>'exc_type' IN ('TimeLimitExceeded','SoftTimeLimitExceeded',
      'StartToCloseTimeoutError','HeartbeatTimeoutError'))"""

#: The steps ``s`` inside the saga %(saga)s of the run %(run)s, those of sagas inside it too.
INSIDE = """
    WITH RECURSIVE inside AS (
      SELECT no, kind FROM byrd.steps WHERE run_id = %(run)s AND saga = %(saga)s AND kind <> 'compensation'
      UNION
      SELECT s.no, s.kind FROM inside i JOIN byrd.steps s ON s.run_id = %(run)s AND s.saga = i.no
       WHERE i.kind = 'saga' AND s.kind <> 'compensation')"""

#: What has taken effect, or may have, and is not undone yet.
_COMPENSABLE = f"""s.run_id = %(run)s AND s.compensation IS NOT NULL
    AND (s.status = 'succeeded' OR (s.status IN ('failed','cancelled','skipped') AND EXISTS
          (SELECT 1 FROM byrd.attempts a WHERE a.step_id = s.id AND {_UNKNOWN})))
    AND NOT EXISTS (SELECT 1 FROM byrd.steps c WHERE c.run_id = s.run_id AND c.compensates = s.no)"""

#: The step ``x`` failed by itself, not because of another, and is not retriable; a saga did, as far as what is around
#: it is concerned.
_CAUSE = """x.status IN ('failed','cancelled') AND x.kind IN ('task','wait','callback','saga')
    AND (CASE WHEN x.kind = 'saga' THEN x.ready_at IS NOT NULL ELSE x.cause IS NULL END)
    AND x.mark IS DISTINCT FROM 'retriable'"""

#: The pivot ``s`` of the run ``r`` would forbid the rollback that is to come, for a step has failed.  One that may have
#: taken effect has to go on, for it would not be undone.
POINTLESS = f"""(s.mark = 'pivot' AND s.kind IN ('task','callback') AND r.pivot IS NULL
    AND EXISTS (SELECT 1 FROM byrd.steps x WHERE x.run_id = s.run_id AND {_CAUSE})
    AND NOT EXISTS (SELECT 1 FROM byrd.attempts a WHERE a.step_id = s.id AND {_UNKNOWN}))"""


def compensable(conn: Connection, run_id: str) -> bool:
    """Tell whether something of the run can be undone."""
    sql = f"SELECT 1 FROM byrd.steps s WHERE {_COMPENSABLE} LIMIT 1"
    return query(conn, sql, {"run": run_id}).first() is not None or bool(_children_to_undo(conn, run_id))


def compensable_once_stopped(conn: Connection, run_id: str) -> bool:
    """Tell whether something of a run that goes on can be undone, or may be once it is cancelled: what runs counts."""
    sql = f"""SELECT 1 FROM byrd.steps s WHERE s.run_id = %(run)s AND (s.compensation IS NOT NULL
                 AND (s.status = 'running' OR s.status IN ('pending','ready') AND EXISTS
                      (SELECT 1 FROM byrd.attempts a WHERE a.step_id = s.id AND {_UNKNOWN}))
               OR s.status = 'running' AND s.task = '{SUBWORKFLOW}') LIMIT 1"""
    if compensable(conn, run_id) or query(conn, sql, {"run": run_id}).first() is not None:
        return True
    children = query(
        conn,
        f"""SELECT c.id::text FROM byrd.steps s JOIN byrd.runs c ON c.parent_step = s.id AND c.pivot IS NULL
             WHERE s.run_id = %(run)s AND s.task = '{SUBWORKFLOW}'
               AND s.status NOT IN ('succeeded','failed','skipped','cancelled')""",
        {"run": run_id},
    ).all()
    return any(compensable_once_stopped(conn, child.id) for child in children)


def _children_to_undo(conn: Connection, run_id: str, saga: int | None = None) -> set[int]:
    """Return the steps of a run whose own runs, past no pivot, have something to undo, or may have once they end."""
    inside = f"{INSIDE} " if saga is not None else ""
    where = "AND s.no IN (SELECT no FROM inside)" if saga is not None else ""
    rows = query(
        conn,
        f"""{inside}SELECT s.no, c.id::text, c.finished_at IS NOT NULL AS ended FROM byrd.steps s
              JOIN byrd.runs c ON c.parent_step = s.id AND c.pivot IS NULL
             WHERE s.run_id = %(run)s AND s.task = '{SUBWORKFLOW}'
               AND s.status IN ('succeeded','failed','skipped','cancelled')
               AND NOT EXISTS (SELECT 1 FROM byrd.steps u WHERE u.run_id = s.run_id AND u.compensates = s.no)
               {where}""",
        {"run": run_id, "saga": saga},
    ).all()
    return {row.no for row in rows if compensable(conn, row.id) or not (row.ended or _undoes_nothing(conn, row.id))}


def _undoes_nothing(conn: Connection, run_id: str) -> bool:
    """Tell whether a run that has not ended will have done so without anything to undo."""
    sql = f"""SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND
                CASE WHEN kind = 'compensation' THEN status NOT IN ('succeeded','skipped')
                     ELSE status IN ('pending','ready','running','waiting')
                          AND (compensation IS NOT NULL OR task = '{SUBWORKFLOW}') END LIMIT 1"""
    return query(conn, sql, {"run": run_id}).first() is None


def cause_of(conn: Connection, run_id: str, saga: int | None = None) -> int | None:
    """Return the step because of which the run, or a saga, is rolled back; None when none of those that failed is one.

    One that is retriable is none.
    """
    inside = f"{INSIDE} " if saga is not None else ""
    where = "AND x.no IN (SELECT no FROM inside)" if saga is not None else ""
    found: int | None = query(
        conn,
        f"""{inside}SELECT x.no FROM byrd.steps x WHERE x.run_id = %(run)s AND {_CAUSE} {where}
             ORDER BY x.status <> 'failed', x.finished_at, x.no LIMIT 1""",
        {"run": run_id, "saga": saga},
    ).scalar()
    return found


def plan(conn: Connection, run_id: str, saga: int | None = None) -> int:
    """Write one compensation for each step that is to be undone, none of them ready yet; return how many."""
    params = {"run": run_id, "saga": saga}
    inside = f"{INSIDE} " if saga is not None else ""
    where = "AND s.no IN (SELECT no FROM inside)" if saga is not None else ""
    undone = {
        row.no for row in query(conn, f"{inside}SELECT s.no FROM byrd.steps s WHERE {_COMPENSABLE} {where}", params)
    }
    undone |= _children_to_undo(conn, run_id, saga)
    if not undone:
        return 0
    # An item comes before its each only: one that is not undone changes no rank, and there may be millions of these.
    edges = query(
        conn,
        """SELECT no, after, join_no FROM byrd.steps WHERE run_id = %(run)s AND kind <> 'compensation'
              AND (kind <> 'item' OR no = ANY(%(undone)s)) ORDER BY no""",
        {**params, "undone": list(undone)},
    )
    ranks = _ranks([(row.no, row.after, row.join_no) for row in edges], undone)
    query(
        conn,
        f"""WITH undo AS (
              SELECT s.no, s.queue, s.compensation::json AS how, u.rank,
                     row_number() OVER (ORDER BY u.rank, s.finished_at DESC, s.no DESC) AS place,
                     (SELECT max(no) FROM byrd.steps WHERE run_id = %(run)s) AS top
                FROM unnest(%(numbers)s::int[], %(ranks)s::int[]) AS u (no, rank)
                JOIN byrd.steps s ON s.run_id = %(run)s AND s.no = u.no)
            INSERT INTO byrd.steps (id, run_id, no, kind, task, queue, options, compensates, rank, saga)
            SELECT gen_random_uuid()::text, %(run)s, top + place, 'compensation',
                   coalesce(how->>'task', '{UNDO_SUBWORKFLOW}'), coalesce(how->>'queue', queue),
                   coalesce(how->>'options', '{{}}'), no, rank, %(saga)s FROM undo""",
        {**params, "numbers": list(ranks), "ranks": list(ranks.values())},
    )
    return len(undone)


def _ranks(edges: Iterable[tuple[int, int | None, int | None]], undone: Collection[int]) -> dict[int, int]:
    """Return each undone step's rank: one more than the most undone steps that came after it, one after another."""
    after: dict[int, int | None] = {}
    members: dict[int, list[int]] = {}
    following: dict[int, set[int]] = {}
    for no, before, join in edges:
        after[no] = before
        following.setdefault(no, set())
        if before is not None:
            following.setdefault(before, set()).add(no)
        if join is not None:
            members.setdefault(join, []).append(no)
            following[no].add(join)
    for container in members:
        # What took a step's place, or joined a group, while the run was under way bears no edge to what came before.
        before = after.get(container)
        if before is not None:
            following[before].update(_first_steps(container, before, after, members))
    longest: dict[int, int] = {}
    for no in TopologicalSorter(following).static_order():
        longest[no] = max((longest[n] + (n in undone) for n in following.get(no, ())), default=0)
    return {no: longest[no] + 1 for no in undone}


def _first_steps(
    container: int, before: int, after: dict[int, int | None], members: dict[int, list[int]]
) -> Iterable[int]:
    """Yield the steps inside a container that come after nothing."""
    todo, seen = list(members[container]), {container, before}
    while todo:
        no = todo.pop()
        if no in seen:
            continue
        seen.add(no)
        earlier = after.get(no)
        if earlier is not None:
            todo.append(earlier)
        elif no not in members:
            yield no
        todo += members.get(no, ())


def release_next(conn: Connection, run_id: str, saga: int | None) -> tuple[list[Wakeup], bool]:
    """pending → ready for the compensations that wait for nothing any more; tell whether all are done.

    The row of the saga, or of the run, is locked first, so that of two that end at once the second sees the first.
    """
    params: dict[str, Any] = {"run": run_id, "saga": saga}
    if saga is None:
        query(conn, "SELECT 1 FROM byrd.runs WHERE id = %(run)s FOR NO KEY UPDATE", params)
    else:
        query(conn, "SELECT 1 FROM byrd.steps WHERE run_id = %(run)s AND no = %(saga)s FOR NO KEY UPDATE", params)
    rank = query(
        conn,
        """SELECT min(rank) FROM byrd.steps WHERE run_id = %(run)s AND compensates IS NOT NULL
             AND saga IS NOT DISTINCT FROM %(saga)s AND status NOT IN ('succeeded','skipped')""",
        params,
    ).scalar()
    if rank is None:
        return [], True
    rows = query(
        conn,
        """SELECT no FROM byrd.steps WHERE run_id = %(run)s AND compensates IS NOT NULL AND status = 'pending'
             AND saga IS NOT DISTINCT FROM %(saga)s AND rank = %(rank)s ORDER BY no""",
        {**params, "rank": rank},
    )
    numbers = [row.no for row in rows]
    return (flow.release(conn, run_id, numbers) if numbers else []), False


class Undone(NamedTuple):
    """The step that a compensation undoes, with what it was called with (JSON), and why it is undone."""

    id: str
    no: int
    task: str
    status: str
    result: str | None
    input: str | None
    args: str
    kwargs: str
    error: str | None
    failed_step: int | None
    failed_task: str | None
    reason: str | None
    by: str | None


def compensated_call(conn: Connection, step_id: str) -> Undone:
    """Return what a compensation is called for, and with."""
    row = query(
        conn,
        """SELECT s.id, s.no, s.task, s.status, s.result, i.result AS input, s.args, s.kwargs,
                  coalesce(x.error, xc.error, r.error) AS error, x.no AS failed_step, x.task AS failed_task,
                  e.detail->>'reason' AS reason, e.detail->>'by' AS by
             FROM byrd.steps c JOIN byrd.steps s ON s.run_id = c.run_id AND s.no = c.compensates
             JOIN byrd.runs r ON r.id = c.run_id
             LEFT JOIN byrd.steps i ON i.run_id = s.run_id AND i.no = s.input
             LEFT JOIN LATERAL (SELECT detail::json AS detail FROM byrd.events e WHERE e.run_id = c.run_id
                 AND e.event = 'rollback_started' AND e.step_no IS NOT DISTINCT FROM c.saga
                ORDER BY e.id DESC LIMIT 1) e ON true
             LEFT JOIN byrd.steps x ON x.run_id = c.run_id AND x.no = (e.detail->>'cause')::int
             LEFT JOIN byrd.steps xc ON xc.run_id = c.run_id AND xc.no = x.cause
            WHERE c.id = %(id)s""",
        {"id": step_id},
    ).one()
    return Undone._make(row)
