"""What a running step adds to its run's plan."""

from __future__ import annotations

import dataclasses

from sqlalchemy import Connection

from byrd.canvas import Plan
from byrd.errors import IllegalTransitionError, StaleAttempt, StepCancelled
from byrd.model import Outcome, RunStatus, StepKind
from byrd.store import locks, plans, steps
from byrd.store.rows import Wakeup, query


def replace(conn: Connection, step_id: str, attempt: int, plan: Plan) -> list[Wakeup]:
    """running → pending: a canvas takes the step's place, and its value becomes the step's.

    ``plan`` may be numbered as it likes.  Raises :class:`StepCancelled` when the run is being cancelled.
    """
    run_id, first_no = open_plan(conn, step_id)
    row = steps.end_attempt(
        conn, step_id, attempt, "pending", Outcome.REPLACED, None,
        extra="replaced = true, waiting = 1, started_at = NULL, ready_at = NULL, run_at = NULL, wake_at = NULL",
    )  # fmt: skip
    if row is None:
        steps.refuse_unless_recorded(conn, step_id, attempt, Outcome.REPLACED)
        return []
    plan = _as_part_of(plans.renumbered(plan, first_no), row.saga)
    plans.insert_steps(conn, run_id, plan.steps)
    query(
        conn,
        "UPDATE byrd.steps SET join_no = %(no)s, join_pos = 0 WHERE run_id = %(run)s AND no = %(output)s",
        {"run": run_id, "no": row.no, "output": plan.output},
    )
    return plans.start(conn, run_id, plan.steps)


def extend_join(conn: Connection, step_id: str, attempt: int, plan: Plan) -> list[Wakeup]:
    """Add a canvas to the group that the running step is a member of; its value comes last in the group's.

    A step that took a replaced one's place is a member of that one's group.  Raises :class:`StepCancelled` when the
    run is being cancelled, and ``ValueError`` when there is no group.
    """
    run_id, first_no = open_plan(conn, step_id)
    steps.check_owner(conn, step_id, attempt)
    output_id = next(step.id for step in plan.steps if step.no == plan.output)
    if query(conn, "SELECT 1 FROM byrd.steps WHERE id = %(id)s", {"id": output_id}).first():
        return []  # added before: the answer was lost on its way
    join = _join_of(conn, step_id)
    if join is None:
        raise ValueError("Current task is not member of any chord")  # Celery's own words
    around = query(
        conn, "SELECT saga FROM byrd.steps WHERE run_id = %(run)s AND no = %(no)s", {"run": run_id, "no": join}
    ).scalar()
    plan = _as_part_of(plans.renumbered(plan, first_no), around)
    plans.insert_steps(conn, run_id, plan.steps)
    query(
        conn,
        """WITH joined AS (
             UPDATE byrd.steps SET waiting = waiting + 1 WHERE run_id = %(run)s AND no = %(join)s)
           UPDATE byrd.steps SET join_no = %(join)s, join_pos =
             (SELECT max(join_pos) + 1 FROM byrd.steps WHERE run_id = %(run)s AND join_no = %(join)s)
            WHERE run_id = %(run)s AND no = %(output)s""",
        {"run": run_id, "join": join, "output": plan.output},
    )
    return plans.start(conn, run_id, plan.steps)


def _as_part_of(plan: Plan, saga: int | None) -> Plan:
    """Return the plan as a part of a saga; errbacks are none."""
    if saga is None:
        return plan
    moved = (
        step
        if step.kind is StepKind.ERRBACK or step.saga is not None
        else dataclasses.replace(step, saga=saga, solo=True)
        for step in plan.steps
    )
    return Plan(tuple(moved), plan.output)


def _join_of(conn: Connection, step_id: str) -> int | None:
    """Return the join of the group that a step is a member of, itself or through the replaced steps above it."""
    found: int | None = query(
        conn,
        """WITH RECURSIVE up AS (
             SELECT j.run_id, j.no, j.kind, j.join_no FROM byrd.steps m
               JOIN byrd.steps j ON j.run_id = m.run_id AND j.no = m.join_no WHERE m.id = %(id)s
             UNION ALL
             SELECT j.run_id, j.no, j.kind, j.join_no FROM up
               JOIN byrd.steps j ON j.run_id = up.run_id AND j.no = up.join_no WHERE up.kind <> 'join')
           SELECT no FROM up WHERE kind = 'join'""",
        {"id": step_id},
    ).scalar()
    return found


def open_plan(conn: Connection, step_id: str) -> tuple[str, int]:
    """Have the step's run to oneself, to add steps to it; return its id and the number of its next step."""
    found = query(conn, "SELECT run_id, kind FROM byrd.steps WHERE id = %(id)s", {"id": step_id}).first()
    if found is None:
        raise StaleAttempt(f"step {step_id} does not exist any more")
    if found.kind in (StepKind.COMPENSATION, StepKind.ITEM):
        what = "a compensation" if found.kind == StepKind.COMPENSATION else "an item of an each"
        raise IllegalTransitionError(f"step {step_id} is {what}, which can neither be replaced nor grow a chord")
    run_id = str(found.run_id)
    locks.own_run(conn, run_id)
    row = query(
        conn,
        """SELECT r.status, (SELECT max(no) + 1 FROM byrd.steps s WHERE s.run_id = r.id) AS next_no,
                  (SELECT g.status NOT IN ('pending','succeeded') FROM byrd.steps s
                     JOIN byrd.steps g ON g.run_id = s.run_id AND g.no = s.saga WHERE s.id = %(id)s) AS saga_failed
           FROM byrd.runs r WHERE r.id = %(run)s""",
        {"run": run_id, "id": step_id},
    ).one()
    if row.status == RunStatus.CANCELLING or row.saga_failed:
        # The new steps would never start, and the run would wait for them for ever.
        why = "its saga has failed" if row.saga_failed else "its run is being cancelled"
        raise StepCancelled(f"step {step_id}: {why}")
    return run_id, row.next_no
