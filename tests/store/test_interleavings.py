"""Random interleavings of all transitions, statement by statement, against a small model of what is committed.

All transitions of the tables of :mod:`byrd.model` have to have been seen at the end (:mod:`tests.store.interleavings`
says how).
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import pytest
from celery import chain, chord, group
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from psycopg2 import errors as pg_errors
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

import byrd
from byrd.errors import StaleAttempt
from byrd.model import RUN_TRANSITIONS, STEP_TRANSITIONS
from byrd.store import Counts, Store, growth, progress, runs, sagas, steps, sweeps, waits
from byrd.store.progress import FailedItem
from byrd.store.rows import query
from tests.store.interleavings import EXAMPLES, WHOLE, Change, Op, explore, move
from tests.store.sessions import Statement
from tests.store.test_model import TREES, Builder
from tests.store.traffic import COMMANDS, ENDS, READY, WAITS, Traffic
from tests.store.world import ERROR, World, plan_of, sig, submit

UNSTARTED = '{"byrd_timeouts": {"schedule_to_start": 1e-6}}'
#: Ready pivots, and what else is ready in their runs.
PIVOT = READY.replace("WHERE", "WHERE mark = 'pivot' AND")
BESIDE = READY.replace(
    "WHERE",
    """WHERE mark IS NULL AND kind = 'task' AND EXISTS (SELECT 1 FROM byrd.steps p
        WHERE p.run_id = steps.run_id AND p.status = 'ready' AND p.mark = 'pivot') AND""",
)
#: Ready errbacks, ready steps that have one, and runs that have failed and called one.
ERRBACK = READY.replace("WHERE", "WHERE kind = 'errback' AND")
GUARDED = READY.replace(
    "WHERE",
    """WHERE EXISTS (SELECT 1 FROM byrd.steps e
                      WHERE e.run_id = steps.run_id AND e.after = steps.no AND e.on_failure) AND""",
)
CALLED = """SELECT DISTINCT r.id::text, r.created_at FROM byrd.runs r JOIN byrd.steps s ON s.run_id = r.id
             WHERE r.status = 'failed' AND s.status = 'succeeded' AND s.kind = 'errback' ORDER BY r.created_at"""
#: Runs that go on, and that have done what can be undone, or may have: a step was handed back.
UNDOABLE = """SELECT DISTINCT r.id::text, r.created_at FROM byrd.runs r JOIN byrd.steps s ON s.run_id = r.id
               WHERE r.status = 'running' AND s.compensation IS NOT NULL AND (s.status = 'succeeded' OR EXISTS
                 (SELECT 1 FROM byrd.attempts a WHERE a.step_id = s.id AND a.outcome = 'handed_back'))
               ORDER BY r.created_at"""
RELAYS = ("take_due", "take_overdue", "look_again", "not_sent", "take_oldest", "make_solo", "doubt_all")


def _saga() -> tuple[Any, Any]:
    return chain(sig("saga1"), sig("saga2"), sig("last").on_error(sig("oops"))), "last"


def _nested() -> tuple[Any, Any]:
    inner = byrd.saga(sig("saga4"), group(sig("saga5"), chain(sig("saga6"), sig("x"))))
    return chain(group(byrd.saga(sig("saga3"), inner, sig("z")), sig("saga7")), sig("end")), "end"


def _forward() -> tuple[Any, Any]:
    return chain(sig("saga8"), group(sig("pivot"), sig("retriable")), sig("rest")), "rest"


def _rescue() -> tuple[Any, Any]:
    return chain(chord([sig("a"), sig("b").on_error(sig("rescue"))], sig("c")), sig("d")), "d"


def _pair() -> tuple[Any, Any]:
    return group(sig("one"), sig("two")), ["one", "two"]


def _approval() -> tuple[Any, Any]:
    return chain(byrd.wait_for("ok", timeout=0), chord([sig("x"), byrd.wait_for("no", timeout=0)], sig("y"))), "y"


CANVASES: st.SearchStrategy[tuple[Any, Any]] = st.one_of(
    st.builds(_saga),
    st.builds(_nested),
    st.builds(_nested),
    st.builds(_forward),
    st.builds(_rescue),
    st.builds(_pair),
    st.builds(_approval),
    TREES.map(lambda tree: Builder().build(tree)),
)


@dataclass
class ModelRun:
    """What must become of a run; ``value`` is None once nobody can tell."""

    value: Any
    failed: bool = False
    cancelled: bool = False


class InterleavingMachine(Traffic):
    """All transitions, in plans of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, ModelRun] = {}

    def note(self, op: Op, change: Change) -> None:
        run = self.runs[change.run_id]
        if change.step_id is None:
            if change.new == "cancelling" and change.old != "rollback_stuck":
                run.cancelled, run.failed = op.name != "end_overdue_runs", op.name == "end_overdue_runs"
            if change.transition == "roll_back":
                run.cancelled = True
            elif change.old in ("failed", "cancelled"):
                run.cancelled = run.failed = False
        elif change.new in ("failed", "cancelled") and not run.cancelled:
            run.failed |= change.old in ("ready", "running") and change.kind in ("task", "callback")
            run.failed |= change.old == "waiting"

    # -- what people do --------------------------------------------------------------------------

    @initialize(data=st.data(), first=CANVASES, second=CANVASES)
    def begin(self, data: st.DataObject, first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
        self.favourites = data.draw(st.lists(st.sampled_from(sorted(self.moves)), max_size=4))
        for made in (first, second):
            self.submit_one(made, whole=True)

    @move(lambda self: len(self.open_runs) < 3, made=CANVASES, whole=WHOLE)
    def submit(self, made: tuple[Any, Any], whole: bool) -> None:
        self.submit_one(made, whole=whole)

    def submit_one(self, made: tuple[Any, Any], *, whole: bool) -> None:
        canvas, value = made
        run_id = str(uuid.UUID(int=len(self.runs) + 1))  # the same in each execution of an example
        self.runs[run_id] = ModelRun(value)
        plan = plan_of(canvas, shared=True)
        self.start(Op("submit", lambda conn: submit(conn, run_id, plan)), whole=whole)

    @move(worker=st.integers(0, 1), before=st.integers(0, 6), how=st.sampled_from(ENDS), whole=WHOLE)
    def work(self, data: st.DataObject, worker: int, before: int, how: str, whole: bool) -> None:
        """Claim steps, and complete them right away; end the last one in any way."""
        for left in range(before, -1, -1):
            row, known = self.pick(data, READY), len(self.claims)
            if row is None:
                return
            self.claim_one(row, worker, row.attempt, whole=True)
            if len(self.claims) == known:
                return
            self.end_one(self.claims[-1], "complete" if left else how, whole=whole or left > 0)

    @move(hows=st.lists(st.sampled_from(["fail", "fail", "complete", "retry"]), min_size=1, max_size=4), whole=WHOLE)
    def roll_back(self, data: st.DataObject, hows: list[str], whole: bool) -> None:
        """Bring rollbacks a few steps on."""
        for left, how in reversed(list(enumerate(hows))):
            self.roll_back_one(data, how, whole=whole or left > 0)

    def roll_back_one(self, data: st.DataObject, how: str, *, whole: bool) -> None:
        """Try again, or settle, what is stuck, end a compensation, or give cause for one."""
        stuck = self.pick(data, "SELECT id::text FROM byrd.runs WHERE status = 'rollback_stuck' ORDER BY created_at")
        undo = self.pick(data, READY.replace("WHERE", "WHERE kind = 'compensation' AND"))
        done = self.pick(data, UNDOABLE)
        known = len(self.claims)
        if stuck is not None:
            self.command_one(data, stuck.id, whole=whole, names=COMMANDS["rollback_stuck"])
        elif undo is not None:
            self.claim_one(undo, 0, undo.attempt, whole=True)
            if len(self.claims) > known:
                self.end_one(self.claims[-1], how, whole=whole)
        elif done is not None:
            cause = Op("cancel", lambda conn: runs.cancel(conn, done.id, compensate=True))
            self.start(cause, whole=whole)

    @move(most=st.integers(1, 4), whole=WHOLE)
    def call_errback(self, data: st.DataObject, most: int, whole: bool) -> None:
        """Let steps fail that have an errback, let that succeed, and try their run again, which recalls it."""
        for _ in range(most):
            called, errback, guarded = (self.pick(data, sql) for sql in (CALLED, ERRBACK, GUARDED))
            row, known = errback or guarded, len(self.claims)
            if called is not None:
                self.retry_one(called.id, whole=whole)
            elif row is not None:
                self.claim_one(row, 1, row.attempt, whole=True)
                if len(self.claims) > known:
                    self.end_one(self.claims[-1], "complete" if row is errback else "fail", whole=whole)

    def retry_one(self, run_id: str, *, whole: bool) -> None:
        self.start(Op("retry_run", lambda conn: runs.retry(conn, run_id)), whole=whole)

    @move(lambda self: self.claims, grow=st.booleans(), whole=WHOLE)
    def change_plan(self, data: st.DataObject, grow: bool, whole: bool) -> None:
        claim = self.draw_claim(data)
        if claim.kind == "compensation" or (grow and claim.join_no is None):
            return
        plan = plan_of(sig("added") if grow else chain(group(sig("r1"), sig("r2")), sig(claim.task)), shared=True)
        name = "extend_join" if grow else "replace"
        function = growth.extend_join if grow else growth.replace

        def committed(result: Any, changes: list[Change]) -> None:
            if grow:
                assert self.owners.get(claim.id, (0,))[0] == claim.attempt
                self.runs[claim.run_id].value = None
            else:
                self.ended(claim, name)(result, changes)

        def act(conn: Connection) -> Any:
            try:
                return function(conn, claim.id, claim.attempt, plan)
            except ValueError as exc:  # not a member of any group
                raise StaleAttempt(str(exc)) from exc

        self.start(Op(name, act, committed), whole=whole)

    @move(lambda self: self.claims, what=st.sampled_from(["save", "remember", "failed", "user"]), whole=WHOLE)
    def write_progress(self, data: st.DataObject, what: str, whole: bool) -> None:
        claim = self.draw_claim(data)

        def write(conn: Connection) -> None:
            if what == "save":
                progress.save(conn, claim.id, claim.attempt, "items", Counts("1", 1, 0, done=False))
            elif what == "remember":
                progress.remember(conn, claim.id, claim.attempt, "step:x", "1")
            else:
                steps.check_owner(conn, claim.id, claim.attempt)
                progress.put_failed(
                    conn, claim.id, "items", [FailedItem("1", "1", 1, ERROR, quarantined=what == "user")]
                )

        def committed(_result: Any, changes: list[Change]) -> None:
            assert self.owners[claim.id][0] == claim.attempt, "a stale attempt wrote progress"
            assert not changes

        self.start(Op("progress", write, committed), whole=whole)

    @move(whole=WHOLE)
    def stop_pivot(self, data: st.DataObject, whole: bool) -> None:
        """Stop a pivot that nobody has started, most often after another step of its run was made to fail."""
        if self.pick(data, PIVOT) is None and len(self.open_runs) < 3:
            self.submit_one((group(sig("saga9"), sig("pivot"), sig("t")), ["saga9", "pivot", "t"]), whole=True)
        row = self.pick(data, PIVOT)
        beside = self.pick(data, BESIDE) if row is not None else None
        known = len(self.claims)
        if beside is not None:
            self.claim_one(beside, 0, beside.attempt, whole=True)
            if len(self.claims) > known:
                self.end_one(self.claims[-1], "fail", whole=True)
        if row is not None:
            self.start(Op("stop_pivot", lambda conn: sagas.stop_pivot(conn, row.id)), whole=whole)

    @move(whole=WHOLE)
    def miss_start(self, data: st.DataObject, whole: bool) -> None:
        row = self.pick(data, READY)
        if row is not None and data.draw(st.integers(0, 2)) == 0:
            self.quietly(
                """UPDATE byrd.steps SET options = %(o)s, ready_at = now() WHERE id IN
                     (SELECT id FROM byrd.steps WHERE id = %(id)s AND status = 'ready' FOR UPDATE SKIP LOCKED)""",
                o=UNSTARTED, id=row.id,
            )  # fmt: skip
            self.start(Op("miss_start", lambda conn: steps.miss_start(conn, row.id)), whole=whole)

    @move(token=st.booleans(), sql=st.booleans(), whole=WHOLE)
    def signal(self, data: st.DataObject, token: bool, sql: bool, whole: bool) -> None:
        row = self.pick(data, WAITS)
        if row is None:
            return
        payload, once = json.dumps(row.signal), str(uuid.uuid4()) if token else None

        def send(conn: Connection) -> Any:
            if sql:
                return query(
                    conn, "SELECT byrd.signal(%(run)s, %(name)s, %(payload)s)",
                    {"run": row.run_id, "name": row.signal, "payload": payload},
                ).all()  # fmt: skip
            return waits.signal(conn, row.run_id, row.signal, payload, token=once)

        self.start(Op("signal", _if_open(send, row.run_id) if sql else send), whole=whole)

    @move(whole=WHOLE)
    def revoke_wait(self, data: st.DataObject, whole: bool) -> None:
        row = self.pick(data, f"{WAITS} LIMIT 5")
        if row is not None and data.draw(st.integers(0, 3)) == 0:
            self.start(Op("revoke", lambda conn: steps.revoke_waiting(conn, row.id)), whole=whole)

    @move(
        name=st.sampled_from(RELAYS),
        solo=st.booleans(),
        whole=WHOLE,
    )
    def relay(self, name: str, solo: bool, whole: bool) -> None:
        self.quietly(
            """UPDATE byrd.steps SET wake_at = now() - interval '1 s' WHERE id IN
                 (SELECT id FROM byrd.steps WHERE status = 'ready' AND wake_at < 'infinity' FOR UPDATE SKIP LOCKED)"""
        )
        functions: dict[str, Statement] = {
            "take_due": sweeps.take_due,
            "take_overdue": lambda conn: sweeps.take_overdue(conn, "work", solo=solo, resend=1),
            "look_again": lambda conn: _look_again(conn, solo=solo),
            "not_sent": lambda conn: sweeps.not_sent(conn, list(sweeps.late_steps(conn, "work", solo=solo))),
            "take_oldest": lambda conn: sweeps.take_oldest(conn, "work", limit=2),
            "make_solo": lambda conn: sweeps.make_solo(conn, "work"),
            "doubt_all": sweeps.doubt_all,
        }
        self.start(Op(name, functions[name], _nothing_changes), whole=whole)

    # -- what must be ------------------------------------------------------------------------------

    def come_to_ends(self) -> None:
        self.world.sql("UPDATE byrd.workers SET lease_until = now() - interval '1 s'")
        while self.world.sql("SELECT 1 FROM byrd.steps WHERE status = 'running'"):
            self.world.do(sweeps.recover, max_preemptions=1000)
        self.world.worker_id = self.world.add_worker()
        there = {str(row.id) for row in self.world.sql("SELECT id FROM byrd.runs")}
        for run_id, run in self.runs.items():
            if run_id in there:
                self.drive(run_id, run)
        self.world.check()

    def drive(self, run_id: str, run: ModelRun) -> None:
        """Take a run to its end: it must be the one that the model says."""
        self.world.sql("UPDATE byrd.steps SET expires_at = NULL RETURNING 1")
        # From now on none fails any more.
        self.world.sql("UPDATE byrd.steps SET fallback = to_json(signal) WHERE signal IS NOT NULL RETURNING 1")
        self.world.sql("UPDATE byrd.steps SET run_at = now() WHERE status = 'ready' AND run_at > now() RETURNING 1")
        if self.world.run(run_id).status == "paused":
            self.world.do(runs.resume, run_id)
        row = self.world.drive(run_id, check=False)
        if row.status == "rollback_stuck":
            self.world.do(runs.retry, run_id)
            row = self.world.drive(run_id, check=False)
        expected = "cancelled" if run.cancelled else "failed" if run.failed else "succeeded"
        assert row.status == expected, "\n".join(
            f"{s.no} {s.kind} {s.status}, attempt {s.attempt}, {s.preemptions} preemptions, wake_at {s.wake_at}"
            for s in self.world.steps(run_id)
        )
        if expected == "succeeded" and run.value is not None:
            assert self.world.result(run_id) == run.value


def _if_open(function: Statement, run_id: str) -> Statement:
    """Skip what a database function refuses in its own words."""

    def act(conn: Connection) -> Any:
        try:
            return function(conn)
        except DBAPIError as exc:
            if isinstance(exc.orig, pg_errors.ObjectNotInPrerequisiteState):
                raise StaleAttempt(f"run {run_id} takes no signal") from exc
            raise

    return act


def _look_again(conn: Connection, *, solo: bool) -> Any:
    """Look at all that is late, as if each second message were missing."""
    late = sweeps.late_steps(conn, "work", solo=solo)
    return sweeps.look_again(conn, late, list(late)[::2])


def _nothing_changes(_result: Any, changes: list[Change]) -> None:
    assert not changes, f"the relay moved something: {changes}"


#: No task has a limit here: test_limits.py has a course of its own for these.
WANTED = {f"run {t.name}" for t in RUN_TRANSITIONS} | {f"step {t.name}" for t in STEP_TRANSITIONS}
WANTED -= {"step put_off"}


@pytest.mark.timeout(3600 if EXAMPLES > 100 else 1500)
def test_all_transitions_in_any_interleaving_of_three_sessions(noted_store: Store) -> None:
    explore(InterleavingMachine, noted_store, WANTED)


def test_a_run_whose_callback_was_revoked_says_why_it_failed(world: World) -> None:
    """What the interleavings found: the output was there, nothing had failed, and the error was lost."""
    canvas = sig("a")
    canvas.link(sig("told"))
    run = world.submit(canvas)
    world.settle(world.claim(run, "a"))
    world.do(steps.revoke, world.step(run, "told").id, "revoked")
    row = world.run(run)
    assert (row.status, json.loads(row.error or "{}").get("exc_message")) == ("failed", ["revoked"])
