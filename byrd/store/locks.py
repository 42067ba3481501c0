"""Who waits for whom: the advisory locks, each held until its transaction ends.

A transition of a step *shares* its run with the others; what moves the run, or changes the shape of its plan, has the
run to itself.  Each takes this lock first, then rows in the plan's order (the step, what comes after it, the joins from
the inside out, the run), so that no two of them wait for one another.  A shared row lock would do the same at first
sight, but whoever wants the run alone would starve in a busy one; these locks are fair.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

from byrd.store.rows import query
from byrd.waits import SUBWORKFLOW

#: One process at a time relays, recovers, and ends waits.
RELAY, RECOVERY, WAITS = 0x62797264_02, 0x62797264_03, 0x62797264_04

_BATCH = 0x62797265
_RUN = "1652126308, hashtext({run}::text)"
#: Shared by the claims of a slice (``byrd.work``): a worker is not given up while one of them is under way.
_WORKER = "1652126310, hashtext(%(worker)s)"

#: A row source that shares the run of the step %(id)s, for the FROM of the statement that moves the step.
SHARE_RUN_OF_STEP = f"""(SELECT pg_advisory_xact_lock_shared({_RUN.format(run="run_id")})
    FROM byrd.steps WHERE id = %(id)s) shared_run"""
#: The same for what ends a step that has not started: of an item it has the each locked first.  That is against the
#: order, but so does an each that ends, or stops, its items.
SHARE_RUN_AND_EACH_OF_STEP = f"""(SELECT count(*) FROM
    (SELECT run_id, join_no, kind, status, pg_advisory_xact_lock_shared({_RUN.format(run="run_id")})
       FROM byrd.steps WHERE id = %(id)s OFFSET 0) i LEFT JOIN LATERAL
    (SELECT 1 FROM byrd.steps e WHERE e.run_id = i.run_id AND e.no = i.join_no AND i.kind = 'item'
        AND i.status = 'ready' FOR NO KEY UPDATE) held ON true) shared_run"""
#: An expression that shares the run ``s.run_id`` unless somebody has it to himself; false then.
TRY_SHARE_RUN = f"pg_try_advisory_xact_lock_shared({_RUN.format(run='s.run_id')})"

#: An expression that has the run ``w.run_id`` to itself unless somebody shares it; false then.
TRY_OWN_RUN = f"pg_try_advisory_xact_lock({_RUN.format(run='w.run_id')})"


def own_run(conn: Connection, run_id: str) -> None:
    """Have a run to oneself: wait until no transition of its steps is under way."""
    query(conn, f"SELECT pg_advisory_xact_lock({_RUN.format(run='%(run)s::uuid')})", {"run": run_id})


def own_run_of(conn: Connection, step_id: str) -> None:
    """Have the run of a step to oneself."""
    own_run(conn, str(query(conn, "SELECT run_id FROM byrd.steps WHERE id = %(id)s", {"id": step_id}).scalar_one()))


def own_runs(conn: Connection, run_ids: Iterable[str]) -> None:
    """Have several runs to oneself; they are taken in the order of their ids, as by everybody who takes several."""
    query(
        conn,
        f"SELECT pg_advisory_xact_lock({_RUN.format(run='run')}) FROM unnest(%(runs)s::uuid[]) AS run",
        {"runs": sorted(run_ids)},
    )


def own_families(conn: Connection, run_ids: Iterable[str]) -> None:
    """Have several runs to oneself with the open ones within them, and in those, which are stopped when they are."""
    found = query(
        conn,
        """WITH RECURSIVE family AS (
             SELECT unnest(%(runs)s::uuid[]) AS id
             UNION
             SELECT c.id FROM family f JOIN byrd.steps s ON s.run_id = f.id AND s.task = %(task)s
               JOIN byrd.runs c ON c.parent_step = s.id AND c.finished_at IS NULL)
           SELECT id::text FROM family""",
        {"runs": list(run_ids), "task": SUBWORKFLOW},
    )
    own_runs(conn, found.scalars())


def own_worker(conn: Connection, worker_id: str) -> None:
    """Have a worker to oneself: wait until none of its slices claims anything."""
    query(conn, f"SELECT pg_advisory_xact_lock({_WORKER})", {"worker": worker_id})


def try_own_worker(conn: Connection, worker_id: str) -> bool:
    """Have a worker to oneself, unless one of its slices claims something just now; false then."""
    return bool(query(conn, f"SELECT pg_try_advisory_xact_lock({_WORKER})", {"worker": worker_id}).scalar())


def own_batch(conn: Connection, step_id: str) -> None:
    """Have to oneself what a step does to other runs: a batch whose answer was lost may be committing still."""
    query(conn, "SELECT pg_advisory_xact_lock(%(key)s, hashtext(%(id)s))", {"key": _BATCH, "id": step_id})


def alone(conn: Connection, key: int) -> bool:
    """Tell whether this transaction is the only one that does what ``key`` stands for."""
    # Nothing holds the lock for longer than this, a suspended process included.
    query(conn, "SET LOCAL idle_in_transaction_session_timeout = '5s'")
    return bool(query(conn, "SELECT pg_try_advisory_xact_lock(%(key)s)", {"key": key}).scalar())
