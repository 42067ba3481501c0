"""The tables of transitions in the model against the SQL: each transition's own statement, tried from every state."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from celery import chain, chord, group
from psycopg2 import IntegrityError
from sqlalchemy.exc import DBAPIError, NoResultFound

import byrd
from byrd.errors import IllegalTransitionError, StaleAttempt
from byrd.limits import Limit
from byrd.model import (
    FINAL_RUN,
    FINAL_STEP,
    RUN_TRANSITIONS,
    STEP_TRANSITIONS,
    Outcome,
    RunStatus,
    StepKind,
    StepStatus,
    Transition,
)
from byrd.store import (
    Store,
    flow,
    growth,
    limits,
    plans,
    reading,
    runs,
    sagas,
    steps,
    sweeps,
    termination,
    timeouts,
    waits,
)
from byrd.store.migrations.rules import RUN_RULES, STEP_RULES
from byrd.store.rows import query
from tests.store.world import ERROR, World, plan_of, sig

REFUSALS = (StaleAttempt, IllegalTransitionError, NoResultFound)


@pytest.fixture
def world(store: Store) -> World:
    """A driver whose tables need not be right at the end: these tests write states that no path leads to."""
    return World(store)


@dataclass(frozen=True)
class Case:
    """A step to try a transition on, with what its statement may ask for."""

    world: World
    run_id: str
    step_id: str
    no: int
    attempt: int = 1

    def do(self, statement: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run a statement about this very attempt at the step."""
        self.world.do(statement, self.step_id, self.attempt, *args, **kwargs)


def put_step(world: World, step_id: str, status: str) -> None:
    """Write a step's status, with all that the CHECKs want with it, as after its first attempt."""
    final, running = StepStatus(status).final, status == "running"
    [row] = world.sql(
        """UPDATE byrd.steps SET status = %(status)s, attempt = 1, started_at = now(),
                  finished_at = CASE WHEN %(final)s THEN now() END,
                  result = CASE WHEN %(status)s = 'succeeded' THEN '1' END,
                  error = CASE WHEN %(status)s IN ('failed','cancelled') THEN %(error)s END,
                  run_at = now(), ready_at = now(),
                  wake_at = now() + CASE WHEN %(status)s = 'waiting' THEN interval '0' ELSE interval '1 minute' END,
                  worker_id = CASE WHEN %(running)s THEN %(worker)s::uuid END,
                  pid = CASE WHEN %(running)s THEN 1 END,
                  claim = CASE WHEN %(running)s THEN gen_random_uuid() END
           WHERE id = %(id)s RETURNING kind""",
        id=step_id, status=status, final=final, running=running, worker=world.worker_id, error=ERROR,
    )  # fmt: skip
    assert row is not None


def put_run(world: World, run_id: str, status: str, *, outcome: str = "cancelled", compensate: bool = False) -> None:
    """Write a run's status, with all that the CHECKs want with it."""
    world.sql(
        """UPDATE byrd.runs SET status = %(status)s, outcome = %(outcome)s, compensate = %(compensate)s,
                  finished_at = CASE WHEN %(final)s THEN now() END WHERE id = %(id)s RETURNING 1""",
        id=run_id, status=status, final=RunStatus(status).final, outcome=outcome, compensate=compensate,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- steps


def in_chain(world: World, before: str = "succeeded") -> Case:
    """The middle of a chain whose first step is in the state ``before``."""
    run = world.submit(chain(sig("first"), sig("x", expires=60, link_error=sig("errback")), sig("last")))
    put_step(world, world.step(run, "first").id, before)
    step = world.step(run, "x")
    world.sql("UPDATE byrd.steps SET expires_at = now() - interval '1 s' WHERE id = %(id)s RETURNING 1", id=step.id)
    return Case(world, run, step.id, step.no)


def in_chain_in_time(world: World) -> Case:
    """The same, not expired."""
    case = in_chain(world)
    world.sql("UPDATE byrd.steps SET expires_at = NULL WHERE id = %(id)s RETURNING 1", id=case.step_id)
    return case


def shared(before: str) -> Callable[[World], Case]:
    """The middle of a chain that whoever is awake may run; its first step is in the state ``before``."""

    def build(world: World) -> Case:
        run = world.submit(chain(sig("first"), sig("x"), sig("last")), shared=True)
        put_step(world, world.step(run, "first").id, before)
        step = world.step(run, "x")
        return Case(world, run, step.id, step.no)

    return build


def as_join(member: str) -> Callable[[World], Case]:
    """A chord's join, one of whose members has ended as ``member``."""

    def build(world: World) -> Case:
        run = world.submit(chord([sig("a"), sig("b")], sig("body")))
        put_step(world, world.step(run, "a").id, "succeeded")
        put_step(world, world.step(run, "b").id, member)
        [join] = [step for step in world.steps(run) if step.kind == "join"]
        return Case(world, run, join.id, join.no)

    return build


def as_replaced(world: World) -> Case:
    """A step whose replacement is done."""
    run = world.submit(sig("x"))
    claim = world.claim(run, "x")
    world.do(growth.replace, claim.id, claim.attempt, plan_of(sig("new")))
    put_step(world, world.step(run, "new").id, "succeeded")
    return Case(world, run, claim.id, claim.no)


def as_body(world: World) -> Case:
    """The body of a chord whose join has failed."""
    case = as_join("failed")(world)
    put_step(world, case.step_id, "failed")
    world.sql("UPDATE byrd.steps SET cause = 1 WHERE id = %(id)s RETURNING 1", id=case.step_id)
    body = world.step(case.run_id, "body")
    return Case(world, case.run_id, body.id, body.no)


def as_errback(world: World) -> Case:
    """An errback in a run that has failed."""
    run = world.submit(sig("first", link_error=sig("x")))
    put_step(world, world.step(run, "first").id, "failed")
    step = world.step(run, "x")
    put_run(world, run, "failed")
    return Case(world, run, step.id, step.no)


def in_failed_run(world: World) -> Case:
    """A step whose run, and whose predecessor, have failed."""
    case = in_chain(world, before="failed")
    put_run(world, case.run_id, "failed")
    return case


def in_cancelled_run(world: World) -> Case:
    """A step whose run is being cancelled."""
    case = in_chain(world)
    put_run(world, case.run_id, "cancelling")
    return case


def in_terminated_run(world: World) -> Case:
    """The same, whose grace time is over."""
    case = in_cancelled_run(world)
    world.sql("UPDATE byrd.runs SET terminate_at = now() WHERE id = %(id)s RETURNING 1", id=case.run_id)
    return case


def as_uncalled_errback(world: World) -> Case:
    """An errback in a run that is about to succeed."""
    run = world.submit(sig("first", link_error=sig("x")))
    put_step(world, world.step(run, "first").id, "succeeded")
    step = world.step(run, "x")
    return Case(world, run, step.id, step.no)


def as_wait(world: World) -> Case:
    """A wait whose time has come in the middle of a chain."""
    run = world.submit(chain(sig("first"), byrd.wait_for("ok", timeout=0), sig("last")))
    put_step(world, world.step(run, "first").id, "succeeded")
    step = world.step(run, "byrd.wait_for")
    return Case(world, run, step.id, step.no)


def as_wait_with_a_default(world: World) -> Case:
    """The same, with a default."""
    case = as_wait(world)
    world.sql("UPDATE byrd.steps SET fallback = '1' WHERE id = %(id)s RETURNING 1", id=case.step_id)
    return case


def as_wait_that_is_too_late(world: World) -> Case:
    """The same, revoked before it began."""
    case = as_wait(world)
    world.sql("UPDATE byrd.steps SET expires_at = 'epoch' WHERE id = %(id)s RETURNING 1", id=case.step_id)
    return case


def as_saga(member: str) -> Callable[[World], Case]:
    """A saga in a run, whose only step has ended as ``member``."""

    def build(world: World) -> Case:
        run = world.submit(chain(byrd.saga(sig("first")), sig("last")))
        put_step(world, world.step(run, "first").id, member)
        step = world.step(run, "byrd.saga")
        return Case(world, run, step.id, step.no)

    return build


def as_compensation(world: World) -> Case:
    """A compensation in a rollback that is stuck at another."""
    run = world.submit(chain(group(sig("saga_a"), sig("saga_b")), sig("last")))
    for name, status in (("saga_a", "succeeded"), ("saga_b", "succeeded"), ("last", "failed")):
        put_step(world, world.step(run, name).id, status)
    [join] = [step for step in world.steps(run) if step.kind == "join"]
    put_step(world, join.id, "succeeded")
    world.do(runs.finish_if_done, run)
    put_step(world, world.step(run, "undo_saga_b").id, "failed")
    put_run(world, run, "rollback_stuck", outcome="failed")
    step = world.step(run, "undo_saga_a")
    return Case(world, run, step.id, step.no)


def as_pivot_in_vain(world: World) -> Case:
    """A pivot beside a step that has failed."""
    run = world.submit(group(sig("pivot"), sig("bad")))
    put_step(world, world.step(run, "bad").id, "failed")
    step = world.step(run, "pivot")
    return Case(world, run, step.id, step.no)


def after_pivot(world: World) -> Case:
    """The middle of a chain in a run that goes forward only."""
    case = in_chain(world)
    world.sql("UPDATE byrd.runs SET pivot = 0 WHERE id = %(id)s RETURNING 1", id=case.run_id)
    return case


def new_plan() -> Any:
    return plan_of(sig("new"))


def claim_it(case: Case) -> None:
    case.do(steps.claim, task="x", worker_id=case.world.worker_id, pid=1, token=str(uuid.uuid4()))


def claim_with_others(case: Case) -> None:
    case.world.share_all()
    case.world.work(own=case.world.step(case.run_id, "x"), most=1)


def complete_with_others(case: Case) -> None:
    case.world.work([case.world.claim_of(case.step_id, case.attempt)])


def run_on(case: Case) -> None:
    case.world.share_all()
    first = case.world.step(case.run_id, "first")
    case.world.work([case.world.claim_of(first.id, 1)], most=1)


def put_back(case: Case) -> Any:
    found = case.world.do(steps.put_back, case.step_id, case.attempt, worker_id=case.world.worker_id, pid=1)
    if found:
        assert case.world.step(case.run_id, case.no).attempt == case.attempt - 1
    return found


def terminate_it(case: Case) -> None:
    doomed = termination.Doomed(case.step_id, case.attempt, 1)
    case.world.do(termination.terminate, doomed, worker_id=case.world.worker_id, ended=True)


def expire_it(case: Case) -> None:
    # Only a step that has never started expires.
    case.world.sql("UPDATE byrd.steps SET attempt = 0 WHERE id = %(id)s AND status = 'ready'", id=case.step_id)
    case.world.do(steps.expire, case.step_id)


def put_it_off(case: Case) -> None:
    """What a claim does in the same transaction, of a limit that lets nothing start."""
    world = case.world
    world.do(limits.declare, [Limit(concurrency=1, name="none")])
    world.do(limits.change, "none", concurrency=0)
    [row] = world.sql("SELECT claim FROM byrd.steps WHERE id = %(id)s", id=case.step_id)
    world.sql(
        "SELECT byrd.admit(%(id)s, %(claim)s::uuid, 'none', '', NULL, 0, 1, 1)",
        id=case.step_id, claim=row.claim or str(uuid.uuid4()),
    )  # fmt: skip


def timed(timeouts: str, retry: Any = None) -> Callable[[World], Case]:
    """The middle of a chain, whose time is over before anybody looks."""

    def build(world: World) -> Case:
        case = in_chain_in_time(world)
        options = {"byrd_timeouts": {timeouts: 1e-6}, **({"byrd_retry": retry} if retry else {})}
        world.sql("UPDATE byrd.steps SET options = %(o)s WHERE id = %(id)s", o=json.dumps(options), id=case.step_id)
        return case

    return build


def time_out(case: Case) -> None:
    case.do(timeouts.time_out)


def finish_join(case: Case) -> None:
    step = case.world.step(case.run_id, case.no)
    case.world.do(flow.finish_join, case.run_id, case.no, is_join=step.kind == "join")


StepDriver = tuple[Callable[[World], Case], Callable[[Case], Any]]

#: How each transition is asked for, and on which step: one entry for each kind of outcome that it may have.
STEP_DRIVERS: dict[str, list[StepDriver]] = {
    "release": [(in_chain, lambda c: c.world.do(flow.release, c.run_id, [c.no]))],
    "claim": [(in_chain_in_time, claim_it), (shared("succeeded"), claim_with_others)],
    "put_off": [(in_chain, put_it_off)],
    "run_on": [(shared("running"), run_on)],
    "complete": [
        (in_chain, lambda c: c.do(steps.complete, '"value"')),
        (shared("succeeded"), complete_with_others),
    ],
    "fail": [(in_chain, lambda c: c.do(steps.fail, ERROR))],
    "persist": [(after_pivot, lambda c: c.do(steps.fail, ERROR))],
    "retry": [(in_chain, lambda c: c.do(steps.retry, ERROR))],
    "time_out": [
        (timed("start_to_close"), time_out),
        (timed("start_to_close", {"max_attempts": 2}), time_out),
        (timed("heartbeat"), time_out),
    ],
    "miss_start": [(timed("schedule_to_start"), lambda c: c.world.do(steps.miss_start, c.step_id))],
    "preempt": [
        (in_chain, lambda c: c.world.do(steps.preempt, c.world.worker_id, reason="gone")),
        (in_chain, lambda c: c.world.do(steps.preempt, c.world.worker_id, reason="gone", max_preemptions=0)),
        (in_chain, lambda c: c.world.do(sweeps.release_worker, c.world.worker_id, reason="gone")),
    ],
    "put_back": [(in_chain, put_back)],
    "hand_back": [(in_chain, lambda c: c.do(steps.hand_back))],
    "replace": [(in_chain, lambda c: c.do(growth.replace, new_plan()))],
    "begin_wait": [(as_wait, lambda c: c.world.do(flow.release, c.run_id, [c.no]))],
    "end_wait": [
        (as_wait, lambda c: c.world.do(waits.end_due)),
        (as_wait, lambda c: c.world.do(waits.end_due_of, c.run_id)),
        (as_wait_with_a_default, lambda c: c.world.do(waits.end_due)),
    ],
    "revoke": [
        (in_chain, lambda c: c.world.do(steps.revoke, c.step_id, "revoked", attempt=c.attempt)),
        (as_wait, lambda c: c.world.do(steps.revoke, c.step_id, "revoked")),
    ],
    "abandon": [(in_cancelled_run, lambda c: c.do(steps.abandon))],
    "terminate": [(in_terminated_run, terminate_it)],
    "ignore": [(in_chain, lambda c: c.do(steps.ignore, ERROR))],
    "expire": [(in_chain, expire_it), (as_wait_that_is_too_late, lambda c: c.world.do(waits.end_due))],
    "finish_join": [(as_join("succeeded"), finish_join), (as_join("failed"), finish_join), (as_replaced, finish_join)],
    "fail_saga": [
        (as_saga("failed"), lambda c: c.world.do(flow._fail_saga, c.run_id, c.no)),
        (as_saga("failed"), lambda c: c.world.do(flow._fail_sagas_of, c.run_id, [c.no + 1])),
    ],
    "end_saga": [(as_saga("failed"), lambda c: c.world.do(waits.end_due))],
    "skip_undo": [(as_compensation, lambda c: c.world.do(sagas.skip, c.run_id, c.no, reason="so"))],
    "done_by_hand": [(as_compensation, lambda c: c.world.do(sagas.done_by_hand, c.run_id, c.no, note="so"))],
    "fail_body": [(as_body, lambda c: c.world.do(flow._fail_bodies, c.run_id, 2))],
    "skip": [
        (lambda w: in_chain(w, before="failed"), lambda c: c.world.do(flow._skip_after, c.run_id, 0)),
        (as_uncalled_errback, lambda c: c.world.do(runs.finish_if_done, c.run_id)),
    ],
    "cancel_step": [
        (in_chain, lambda c: c.world.do(runs.cancel, c.run_id)),
        (as_wait, lambda c: c.world.do(runs.cancel, c.run_id)),
    ],
    "stop_pivot": [(as_pivot_in_vain, lambda c: c.world.do(sagas.stop_pivot, c.step_id))],
    "reopen": [(in_failed_run, lambda c: c.world.do(runs.retry, c.run_id))],
    "recall": [(as_errback, lambda c: c.world.do(runs._recall_errbacks, c.run_id))],
}

#: What these do to the step's run is theirs to do even when the step itself stays as it is.
MOVES_THE_RUN = {"run_on", "cancel_step", "reopen", "skip", "preempt", "abandon", "terminate"}


def states_of(case: Case) -> list[StepStatus]:
    """Return the states that the step can be in at all: a join, a wait or a saga never runs, and none else waits."""
    kind = case.world.step(case.run_id, case.no).kind
    never = {StepStatus.READY, StepStatus.RUNNING} if kind in ("join", "wait", "saga") else set()
    if kind not in ("wait", "saga"):
        never.add(StepStatus.WAITING)
    return [s for s in StepStatus if s not in never]


@pytest.mark.parametrize("transition", STEP_TRANSITIONS, ids=lambda t: t.name)
def test_a_step_moves_only_as_the_table_says(world: World, transition: Transition) -> None:
    reached: set[str] = set()
    left: set[str] = set()
    for build, act in STEP_DRIVERS[transition.name]:
        for status in states_of(build(world)):
            case = build(world)
            put_step(world, case.step_id, status)
            before, everything = world.step(case.run_id, case.no), world.rows()
            try:
                act(case)
            except REFUSALS:
                assert status not in transition.sources, f"refused from {status}"
                assert world.rows() == everything, f"refused from {status}, but something has changed"
            after = world.step(case.run_id, case.no)
            if status in transition.sources:
                assert after.status in transition.targets, f"from {status} to {after.status}"
                reached.add(after.status)
                left.add(status)
            else:
                assert after == before, f"nothing may move it from {status}"
                assert transition.name in MOVES_THE_RUN or world.rows() == everything
            world.sql("DELETE FROM byrd.runs WHERE id = %(id)s RETURNING 1", id=case.run_id)
            world.worker_id = world.add_worker()
    assert reached == set(transition.targets)
    assert left == set(transition.sources)


# ------------------------------------------------------------------------------------------------- runs


def all_done(*, failed: bool = False, outcome: str = "cancelled", compensate: bool = False) -> Callable[..., str]:
    """A run of a saga step and another one, both done."""

    def build(world: World, status: str) -> str:
        run = world.submit(chain(sig("saga_a" if compensate else "a"), sig("b")))
        put_step(world, world.step(run, 0).id, "succeeded")
        put_step(world, world.step(run, 1).id, "failed" if failed else "succeeded")
        put_run(world, run, status, outcome=outcome, compensate=compensate)
        return run

    return build


def going_on(world: World, status: str) -> str:
    """A run with a running step."""
    run = world.submit(chain(sig("a"), sig("b")))
    put_step(world, world.step(run, 0).id, "running")
    put_run(world, run, status)
    return run


def rolled_back(world: World, status: str) -> str:
    """A run with a failed compensation."""
    run = world.submit(chain(sig("saga_a"), sig("b")))
    put_step(world, world.step(run, 0).id, "succeeded")
    put_step(world, world.step(run, 1).id, "failed")
    world.do(runs.finish_if_done, run)
    put_step(world, world.step(run, 2).id, "failed")
    put_run(world, run, status)
    return run


def saga_rolled_back(outcome: str | None) -> Callable[..., str]:
    """A run, to end as ``outcome`` if it was cancelled, with a saga whose compensation has failed."""

    def build(world: World, status: str) -> str:
        world.failing = {"b"}
        run = world.submit(group(byrd.saga(sig("saga_a"), sig("b")), sig("c")))
        for name in ("saga_a", "b"):
            world.settle(world.claim(run, name))
        world.end_waits()
        put_step(world, world.step(run, "undo_saga_a").id, "failed")
        put_step(world, world.step(run, "c").id, "running")
        put_run(world, run, status)
        world.sql("UPDATE byrd.runs SET outcome = %(outcome)s WHERE id = %(id)s RETURNING 1", id=run, outcome=outcome)
        return run

    return build


def saga_rolled_back_in_a_pause(world: World, status: str) -> str:
    """The same, in a run that was paused when the compensation failed."""
    run = saga_rolled_back(None)(world, "running")
    world.do(runs.pause, run)
    put_run(world, run, status)
    world.sql("UPDATE byrd.runs SET outcome = NULL WHERE id = %(id)s RETURNING 1", id=run)
    return run


def roll_back_what_has_ended(conn: Any, run_id: str) -> None:
    """Roll back, unless the run is paused: then it is cancelled first, which has drivers of its own."""
    if reading.get(conn, run_id).status == "paused":
        raise IllegalTransitionError("that is another transition")
    runs.roll_back(conn, run_id)


retry = runs.retry
RunDriver = tuple[Callable[[World, str], str], Callable[..., Any]]

RUN_DRIVERS: dict[str, list[RunDriver]] = {
    "finish": [
        (all_done(), runs.finish_if_done),
        (all_done(failed=True), runs.finish_if_done),
        (all_done(failed=True, compensate=True), runs.finish_if_done),
    ],
    "pause": [(going_on, runs.pause)],
    "resume": [(going_on, runs.resume)],
    "cancel": [(going_on, runs.cancel)],
    "finish_cancel": [
        (all_done(), runs.finish_if_done),
        (all_done(outcome="failed"), runs.finish_if_done),
        (all_done(compensate=True), runs.finish_if_done),
    ],
    "finish_rollback": [(all_done(), runs.finish_if_done), (all_done(outcome="failed"), runs.finish_if_done)],
    "stick": [(rolled_back, lambda conn, run_id: runs.stick(conn, run_id, 2))],
    "roll_back": [(all_done(compensate=True), roll_back_what_has_ended)],
    "retry_rollback": [
        (rolled_back, retry),
        (saga_rolled_back(None), retry),
        (saga_rolled_back("cancelled"), retry),
        (saga_rolled_back_in_a_pause, retry),
    ],
    "retry_run": [(all_done(failed=True), retry)],
}


@pytest.mark.parametrize("transition", RUN_TRANSITIONS, ids=lambda t: t.name)
def test_a_run_moves_only_as_the_table_says(world: World, transition: Transition) -> None:
    reached: set[str] = set()
    left: set[str] = set()
    for build, act in RUN_DRIVERS[transition.name]:
        # One statement may serve several transitions, each from states of its own.
        same = {name for name, drivers in RUN_DRIVERS.items() for _, other in drivers if other is act}
        elsewhere = {s for t in RUN_TRANSITIONS if t.name in same for s in t.sources} - transition.sources
        for status in set(RunStatus) - elsewhere:
            run_id = build(world, status)
            everything = world.rows()
            try:
                world.do(act, run_id)
            except REFUSALS:
                assert status not in transition.sources, f"refused from {status}"
            after = world.run(run_id)
            if status in transition.sources:
                assert after.status in transition.targets, f"from {status} to {after.status}"
                reached.add(after.status)
                left.add(status)
            else:
                assert world.rows() == everything, f"nothing may move it from {status}"
            world.sql("DELETE FROM byrd.runs WHERE id = %(id)s RETURNING 1", id=run_id)
    assert reached == set(transition.targets)
    assert left == set(transition.sources)


def test_every_transition_has_a_driver_and_none_is_left_over() -> None:
    assert set(STEP_DRIVERS) == {t.name for t in STEP_TRANSITIONS}
    assert set(RUN_DRIVERS) == {t.name for t in RUN_TRANSITIONS}


def test_an_operator_alone_has_a_final_state_left() -> None:
    assert {t.name for t in RUN_TRANSITIONS if t.sources & FINAL_RUN} == {"retry_run", "roll_back"}
    assert {t.name for t in STEP_TRANSITIONS if t.sources & FINAL_STEP} == {
        "reopen", "recall", "skip_undo", "done_by_hand",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- the schema


def constraints(store: Store) -> dict[str, str]:
    """Return the definitions of Byrd's rules, constraints and unique indexes, by name."""

    def read(conn: Any) -> dict[str, str]:
        rows = query(
            conn,
            """SELECT conname AS name, pg_get_constraintdef(oid) AS definition FROM pg_constraint
                WHERE connamespace = 'byrd'::regnamespace AND contype IN ('c', 'p', 'u', 'f')
                  AND conrelid <> 'byrd.alembic_version'::regclass
               UNION
               SELECT c.relname, pg_get_indexdef(i.indexrelid) FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
                WHERE i.indisunique AND c.relnamespace = 'byrd'::regnamespace
                  AND i.indrelid <> 'byrd.alembic_version'::regclass""",
        )
        return {**RUN_RULES, **STEP_RULES, **{row.name: row.definition for row in rows}}

    return store.run(read)


@pytest.mark.parametrize(
    ("constraint", "values"),
    [
        ("run_status_known", RunStatus),
        ("step_status_known", StepStatus),
        ("step_kind_known", StepKind),
        ("attempt_outcome_known", Outcome),
    ],
)
def test_the_checks_list_what_the_model_lists(store: Store, constraint: str, values: Any) -> None:
    assert set(re.findall(r"'([^']*)'", constraints(store)[constraint])) == {str(value) for value in values}


@pytest.mark.parametrize(
    ("constraint", "final"), [("run_finished_if_final", FINAL_RUN), ("step_finished_if_final", FINAL_STEP)]
)
def test_the_checks_know_what_is_final(store: Store, constraint: str, final: Any) -> None:
    assert set(re.findall(r"'([^']*)'", constraints(store)[constraint])) == {str(value) for value in final}


NEW_RUN = "INSERT INTO byrd.runs (id, workflow, key, output) VALUES (gen_random_uuid(), 'test', 'k', 0)"
NEW_STEP = "INSERT INTO byrd.steps (id, run_id, no, kind, task) SELECT {id}, {run}, {no}, 'task', 't' FROM byrd.runs"
NEW_CHECKPOINT = "INSERT INTO byrd.checkpoints (step_id, name, attempt) VALUES ({id}, 'items', 1)"
NEW_ITEM = """INSERT INTO byrd.failed_items (step_id, name, cursor, item, tries, error, quarantined)
              VALUES ({id}, 'items', '1', '1', {tries}, '{{}}', false)"""
NEW_ATTEMPT = "INSERT INTO byrd.attempts (step_id, attempt, outcome) VALUES ({id}, {attempt}, '{outcome}')"
NEW_EVENT = "INSERT INTO byrd.events (run_id, event) VALUES (gen_random_uuid(), 'x')"
NEW_WORKER = """INSERT INTO byrd.workers (id, hostname, pid, pool, queues, tasks, version)
                SELECT id, 'w', 1, 'solo', '{}', '{}', '0' FROM byrd.workers LIMIT 1"""
NEW_LIMIT = "INSERT INTO byrd.limits (name, concurrency) SELECT 'l', 1{sets}"
READY = "(SELECT id FROM byrd.steps WHERE no = 0)"
RUN = "(SELECT id FROM byrd.runs)"


def step_with(sets: str, no: int = 0) -> str:
    return f"UPDATE byrd.steps SET {sets} WHERE no = {no}"


#: For each constraint a statement that breaks it alone: on a run of a ready step (0), a join (2), a compensation (5),
#: a saga (6).
ILLEGAL = {
    "runs_pkey": f"INSERT INTO byrd.runs (id, output) VALUES ({RUN}, 0)",
    "runs_key": NEW_RUN,
    "runs_parent": """INSERT INTO byrd.runs (id, output, parent_step)
                      SELECT gen_random_uuid(), n, 's' FROM generate_series(1, 2) n""",
    "run_status_known": "UPDATE byrd.runs SET status = 'lost'",
    "run_finished_if_final": "UPDATE byrd.runs SET status = 'failed'",
    "only_a_cancelled_run_is_terminated": "UPDATE byrd.runs SET terminate_at = now()",
    "run_outcome_known": "UPDATE byrd.runs SET outcome = 'succeeded'",
    "steps_pkey": NEW_STEP.format(id=READY, run="id", no=99),
    "steps_run_no": NEW_STEP.format(id="'new'", run="id", no=0),
    "steps_run_id_fkey": NEW_STEP.format(id="'new'", run="gen_random_uuid()", no=0),
    "steps_compensates": """INSERT INTO byrd.steps (id, run_id, no, kind, task, compensates)
                            SELECT 'new', id, 99, 'compensation', 't', 1 FROM byrd.runs""",
    "step_status_known": step_with("status = 'lost'"),
    "step_kind_known": step_with("kind = 'other'"),
    "step_has_task_unless_join": step_with("task = NULL"),
    "join_never_runs": step_with("status = 'ready', run_at = now(), wake_at = now()", 2),
    "step_running_has_worker": step_with("worker_id = gen_random_uuid()"),
    "step_running_has_claim": step_with("claim = gen_random_uuid()"),
    "step_finished_if_final": step_with("finished_at = now()"),
    "step_result_if_succeeded": step_with("result = '1'"),
    "ready_is_due": step_with("wake_at = NULL"),
    "item_has_each": step_with("kind = 'item'", 3),
    "wait_never_runs": step_with("status = 'ready', run_at = now(), wake_at = now()", 4),
    "waiting_is_due": step_with("status = 'waiting', wake_at = NULL", 4),
    "saga_never_runs": step_with("status = 'ready', run_at = now(), wake_at = now()", 6),
    "rank_of_compensation": step_with("rank = 1"),
    "step_mark_known": step_with("mark = 'other'"),
    "notices_pkey": f"""WITH e AS (INSERT INTO byrd.notices (run_id, step_no) VALUES ({RUN}, 1) RETURNING id, run_id)
                        INSERT INTO byrd.notices (id, run_id, step_no) OVERRIDING SYSTEM VALUE
                        SELECT id, run_id, 2 FROM e""",
    "notices_run_id_fkey": "INSERT INTO byrd.notices (run_id, step_no) VALUES (gen_random_uuid(), 1)",
    "notice_counts": f"INSERT INTO byrd.notices (run_id, step_no, tries) VALUES ({RUN}, 1, -1)",
    "signal_of_whom": step_with("signal_of = 'finance'", 4),
    "fallback_of_wait": step_with("fallback = '1'"),
    "step_counts": step_with("attempt = -1"),
    "compensation_has_step": step_with("compensates = 2"),
    "checkpoints_pkey": f"{NEW_CHECKPOINT.format(id=READY)}, ({READY}, 'items', 2)",
    "checkpoints_step_id_fkey": NEW_CHECKPOINT.format(id="'nobody'"),
    "checkpoint_counts": f"INSERT INTO byrd.checkpoints (step_id, name, attempt, failed) VALUES ({READY}, 'i', 1, -1)",
    "failed_items_pkey": f"{NEW_ITEM.format(id=READY, tries=1)}, ({READY}, 'items', '1', '2', 1, '', true)",
    "failed_items_step_id_fkey": NEW_ITEM.format(id="'nobody'", tries=1),
    "failed_item_tried": NEW_ITEM.format(id=READY, tries=0),
    "attempts_pkey": f"{NEW_ATTEMPT.format(id=READY, attempt=1, outcome='failed')}, ({READY}, 1, 'retried')",
    "attempts_step_id_fkey": NEW_ATTEMPT.format(id="'nobody'", attempt=1, outcome="failed"),
    "attempt_outcome_known": NEW_ATTEMPT.format(id=READY, attempt=1, outcome="succeeded"),
    "events_pkey": f"""WITH e AS (INSERT INTO byrd.events (run_id, event) VALUES ({RUN}, 'x') RETURNING id, run_id)
                       INSERT INTO byrd.events (id, run_id, event) OVERRIDING SYSTEM VALUE
                       SELECT id, run_id, 'y' FROM e""",
    "events_run_id_fkey": NEW_EVENT,
    "events_token": f"""WITH t AS (SELECT {RUN} AS run, gen_random_uuid() AS token)
                        INSERT INTO byrd.events (run_id, event, token)
                        SELECT run, 'x', token FROM t UNION ALL SELECT run, 'y', token FROM t""",
    "signals_pkey": f"""WITH e AS (INSERT INTO byrd.signals (run_id, name, payload) VALUES ({RUN}, 'x', '1')
                                   RETURNING id, run_id)
                        INSERT INTO byrd.signals (id, run_id, name, payload) OVERRIDING SYSTEM VALUE
                        SELECT id, run_id, 'y', '1' FROM e""",
    "signals_run_id_fkey": "INSERT INTO byrd.signals (run_id, name, payload) VALUES (gen_random_uuid(), 'x', '1')",
    "signal_delivered_to_step": f"""INSERT INTO byrd.signals (run_id, name, payload, step_no)
                                    VALUES ({RUN}, 'x', '1', 1)""",
    "workers_pkey": NEW_WORKER,
    "limit_has_key": step_with("limit_name = 'l'"),
    "place_is_used": step_with("limit_slot = now()"),
    "limits_pkey": f"{NEW_LIMIT.format(sets='')} UNION ALL SELECT 'l', 1",
    "limit_counts": NEW_LIMIT.format(sets=" - 1"),
    "limit_rate_is_spacing": "INSERT INTO byrd.limits (name, rate) VALUES ('l', '1/s')",
    "limit_set_counts": "INSERT INTO byrd.limits (name, set_concurrency) VALUES ('l', -2)",
    "limit_set_rate_is_spacing": "INSERT INTO byrd.limits (name, set_rate, set_every) VALUES ('l', '1/s', 0)",
    "limit_keys_pkey": f"""WITH l AS ({NEW_LIMIT.format(sets="")} RETURNING name)
                           INSERT INTO byrd.limit_keys (name, key) SELECT name, 'k' FROM l, generate_series(1, 2)""",
    "limit_keys_name_fkey": "INSERT INTO byrd.limit_keys (name, key) VALUES ('nobody', 'k')",
    "brokers_pkey": "INSERT INTO byrd.brokers (mark) VALUES ('m'), ('m')",
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_the_schema_refuses_an_illegal_row(world: World, name: str) -> None:
    run = world.submit(chain(chord([sig("saga_a"), sig("b")], sig("c")), byrd.sleep(1)), key="k")
    world.sql(
        """INSERT INTO byrd.steps (id, run_id, no, kind, task, compensates)
           VALUES ('undo', %(run)s, 5, 'compensation', 'undo', 1), ('saga', %(run)s, 6, 'saga', 'byrd.saga', NULL)""",
        run=run,
    )
    before = world.rows()
    with pytest.raises(DBAPIError) as caught:
        world.do(query, ILLEGAL[name])
    assert isinstance(caught.value.orig, IntegrityError)
    assert caught.value.orig.diag.constraint_name == name
    assert world.rows() == before


def test_every_constraint_has_an_illegal_row(store: Store) -> None:
    assert set(ILLEGAL) == set(constraints(store))


def test_a_task_id_in_use_is_refused_and_nothing_is_written(world: World) -> None:
    world.submit(sig("a", task_id="mine"))
    before = world.rows()
    with pytest.raises(DBAPIError) as caught:
        world.do(
            plans.submit, str(uuid.uuid4()), plan_of(chain(sig("b"), sig("a", task_id="mine"))), workflow=None,
            title="", key=None, args=None, deadline_seconds=None,
        )  # fmt: skip
    assert isinstance(caught.value.orig, IntegrityError)
    assert caught.value.orig.diag.constraint_name == "steps_pkey"
    assert world.rows() == before
