"""Random interleavings of all transitions, statement by statement, against a small model of what is committed.

Three sessions hold their transactions open: any of them may go on by one statement, wait for another's locks, commit,
roll back or be killed while the others are anywhere in theirs.  A trigger notes each change of a status, and each of a
row that was final, with the transaction, so that what was committed is known exactly: the former have to be in the
tables of :mod:`byrd.model`, all of whose transitions have to have been seen at the end; the latter must not be.
"""

from __future__ import annotations

import inspect
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from celery import chain, chord, group
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from psycopg2 import errors as pg_errors
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

import byrd
from byrd.errors import IllegalTransitionError, StaleAttempt, StepCancelled
from byrd.model import RUN_TRANSITIONS, STEP_TRANSITIONS, Transition
from byrd.store import (
    Claim,
    Counts,
    Store,
    growth,
    progress,
    runs,
    sagas,
    steps,
    sweeps,
    termination,
    timeouts,
    waits,
    work,
)
from byrd.store.progress import FailedItem
from byrd.store.rows import query
from byrd.store.work import Done, Own, Work
from tests.invariants import check_invariants
from tests.store.sessions import Session, Statement, gates
from tests.store.test_model import TREES, Builder
from tests.store.world import ERROR, World, plan_of, sig, submit

EXAMPLES = int(os.environ.get("BYRD_MODEL_EXAMPLES", "6"))
SESSIONS = 3
#: What mostly is asked of a run with such a status; now and then it is anything.
COMMANDS = {
    "running": ("pause", "cancel", "compensate", "terminate"), "cancelling": ("terminate",) * 4,
    "paused": ("resume",) * 4, "failed": ("retry_run",) * 4, "cancelled": ("retry_run", "roll_back") * 2,
    "succeeded": ("roll_back",) * 4, "rollback_stuck": ("retry_run", "retry_run", "skip_undo", "done_by_hand"),
}  # fmt: skip
ENDS = (*["complete"] * 4, *["fail"] * 3, "retry", "hand_back", "put_back", "ignore", "revoke", "time_out")
#: Policies with which an attempt is over time as soon as it runs, and so is a start that nobody has made.
TIMED = (
    '{"byrd_timeouts": {"start_to_close": 1e-6}}',
    '{"byrd_timeouts": {"start_to_close": 1e-6}, "byrd_retry": {"first": 0}}',
    '{"byrd_timeouts": {"heartbeat": 1e-6}}',
)
UNSTARTED = '{"byrd_timeouts": {"schedule_to_start": 1e-6}}'
#: Runs that have succeeded, and have done what can be undone.
ENDED_WELL = """SELECT r.id FROM byrd.runs r WHERE r.status = 'succeeded' AND r.pivot IS NULL AND EXISTS
                 (SELECT 1 FROM byrd.steps s WHERE s.run_id = r.id AND s.status = 'succeeded'
                     AND s.compensation IS NOT NULL) ORDER BY r.id"""
DOOMED = """SELECT s.id FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
             WHERE s.status = 'running' AND r.status = 'cancelling' AND r.terminate_at <= clock_timestamp()"""
READY = "SELECT id, attempt, task FROM byrd.steps WHERE status = 'ready' ORDER BY task, no, ready_at"
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
ALIVE = "SELECT id::text FROM byrd.workers WHERE lease_until > clock_timestamp()"
#: Workers that stop, or have lost their lease, and are still on record.
GONE = """SELECT id::text, started_at FROM byrd.workers WHERE stopping OR lease_until < clock_timestamp()
           ORDER BY started_at"""
#: Waits that are open, in runs that are.
WAITS = """SELECT s.id, s.run_id::text, s.signal FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
            WHERE r.finished_at IS NULL AND s.signal IS NOT NULL AND s.status IN ('pending','waiting')
            ORDER BY s.signal, r.created_at, s.no"""
OPEN = "SELECT id::text FROM byrd.runs WHERE finished_at IS NULL ORDER BY created_at"
#: Runs that go on, and that have done what can be undone, or may have: a step was handed back.
UNDOABLE = """SELECT DISTINCT r.id::text, r.created_at FROM byrd.runs r JOIN byrd.steps s ON s.run_id = r.id
               WHERE r.status = 'running' AND s.compensation IS NOT NULL AND (s.status = 'succeeded' OR EXISTS
                 (SELECT 1 FROM byrd.attempts a WHERE a.step_id = s.id AND a.outcome = 'handed_back'))
               ORDER BY r.created_at"""
#: Compensations that an operator may have an opinion on.
UNDOING = """SELECT no FROM byrd.steps WHERE run_id = %(id)s AND kind = 'compensation'
              AND status IN ('ready','failed','cancelled') ORDER BY no"""
#: Steps whose attempts are told to stop at their next checkpoint.
TOLD = """SELECT s.id FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id JOIN byrd.workers w ON w.id = s.worker_id
           WHERE s.status = 'running' AND (r.status IN ('cancelling', 'paused') OR w.stopping OR EXISTS
             (SELECT 1 FROM byrd.steps g WHERE g.run_id = s.run_id AND g.no = s.saga
                 AND g.status NOT IN ('pending', 'succeeded')))"""
#: Whether an operation is carried out at once, or statement by statement between those of others.
WHOLE = st.sampled_from([True, True, False])
RELAYS = ("take_due", "take_overdue", "look_again", "not_sent", "take_oldest", "make_solo", "doubt_all")
REFUSALS = (StaleAttempt, StepCancelled, IllegalTransitionError)

LOG = """
CREATE TABLE test_log (id bigint GENERATED ALWAYS AS IDENTITY, op text, run_id uuid, step_id text, kind text,
                       replaced bool, worker_id uuid, old text, new text, stopped bool);
CREATE FUNCTION test_note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_TABLE_NAME = 'runs' THEN
    INSERT INTO test_log (op, run_id, old, new)
    VALUES (current_setting('test.op', true), NEW.id, OLD.status, NEW.status);
  ELSE
    INSERT INTO test_log (op, run_id, step_id, kind, replaced, worker_id, old, new, stopped)
    VALUES (current_setting('test.op', true), NEW.run_id, NEW.id, NEW.kind, OLD.replaced, OLD.worker_id, OLD.status,
            NEW.status, coalesce(NEW.kind <> 'saga' AND NEW.error LIKE '%its saga has failed%', false)
                        OR NEW.kind = 'saga' AND NEW.status = 'cancelled' AND NEW.cause IS NOT NULL);
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER test_note AFTER UPDATE ON byrd.runs FOR EACH ROW
  WHEN (OLD.status <> NEW.status OR OLD.finished_at IS NOT NULL AND OLD.* IS DISTINCT FROM NEW.*)
  EXECUTE FUNCTION test_note();
CREATE TRIGGER test_note AFTER UPDATE ON byrd.steps FOR EACH ROW
  WHEN (OLD.status <> NEW.status OR OLD.finished_at IS NOT NULL AND OLD.* IS DISTINCT FROM NEW.*)
  EXECUTE FUNCTION test_note();
"""


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


@dataclass(frozen=True)
class Change:
    """A committed change of a status, or of what was final."""

    op: str
    run_id: str
    step_id: str | None
    kind: str | None
    replaced: bool | None
    worker_id: str | None
    old: str
    new: str
    #: It was cancelled because its saga has failed.
    stopped: bool | None

    @property
    def transition(self) -> str:
        """The name that the tables of the model have for it."""
        assert self.old != self.new, f"{self} writes over what was final"
        table: tuple[Transition, ...] = RUN_TRANSITIONS if self.step_id is None else STEP_TRANSITIONS
        names = [t.name for t in table if self.old in t.sources and self.new in t.targets]
        if self.step_id is not None:
            names = [name for name in names if self._fits(name)]
        assert len(names) == 1, f"{self} is {names or 'no transition'}"
        return names[0]

    def _fits(self, name: str) -> bool:
        joins = self.kind in ("join", "saga") or bool(self.replaced)
        sagas = self.kind == "saga"
        by_hand = self.op in ("skip_undo", "done_by_hand")
        by = {
            "fail": self.op not in (*TAKING, "time_out"), "preempt": self.op in TAKING,
            "time_out": self.op == "time_out", "miss_start": self.op == "miss_start", "retry": self.op == "retry",
            "persist": self.op == "fail", "fail_saga": sagas, "begin_wait": not sagas, "end_saga": sagas,
            "end_wait": not sagas, "skip_undo": by_hand, "done_by_hand": by_hand, "skip": not by_hand,
            "hand_back": self.op == "hand_back", "put_back": self.op == "put_back", "ignore": self.op == "ignore",
            "stop_pivot": self.op == "stop_pivot",
            "abandon": self.op == "abandon", "terminate": self.op == "terminate",
            "expire": self.op in ("expire", *ENDING) and not self.stopped,
            "cancel_step": self.op in STOPPING or bool(self.stopped),
            "revoke": self.op not in ("abandon", "terminate", "ignore", "expire", "stop_pivot", *STOPPING, *ENDING)
                      and not self.stopped,
            "finish_join": joins, "fail_body": not joins, "put_off": False,
        }  # fmt: skip
        return by.get(name, True)


#: What ends waits.
ENDING = ("signal", "end_waits")
#: What stops runs.
STOPPING = ("cancel", "roll_back", "end_overdue_runs")
#: What takes steps away from workers.
TAKING = ("preempt", "preempt_process", "preempt_step", "recover", "release_worker")


@dataclass
class ModelRun:
    """What must become of a run; ``value`` is None once nobody can tell."""

    value: Any
    failed: bool = False
    cancelled: bool = False


@dataclass
class Op:
    """What a session is doing, and what is true once that is committed."""

    name: str
    function: Statement
    #: Called with the result and with what was changed.
    committed: Callable[[Any, list[Change]], None] = lambda _result, _changes: None


@dataclass
class Model:
    """What is committed: the runs, which attempt of which worker owns which step, and who holds a lease."""

    runs: dict[str, ModelRun] = field(default_factory=dict)
    owners: dict[str, tuple[int, str]] = field(default_factory=dict)


#: What may happen: by name, the method, when it may, and what is drawn for it.
MOVES: dict[str, tuple[Callable[..., None], Callable[[Any], Any], dict[str, st.SearchStrategy[Any]]]] = {}
Method = TypeVar("Method", bound=Callable[..., None])


def move(
    when: Callable[[Any], Any] = lambda _machine: True, **draws: st.SearchStrategy[Any]
) -> Callable[[Method], Method]:
    """Let a method be one of the moves.

    They are no rules of their own, for hypothesis leaves many rules out of each example: then sessions stay where they
    are, say, or nothing is submitted any more, and the rest of the example is wasted.
    """

    def mark(method: Method) -> Method:
        if "data" in inspect.signature(method).parameters:
            draws["data"] = st.data()
        MOVES[method.__name__] = (method, when, draws)
        return method

    return mark


class InterleavingMachine(RuleBasedStateMachine):
    """Sessions at work on a few runs."""

    store: Store
    monitor: Connection
    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        for table in ("byrd.runs", "byrd.workers", "test_log"):
            query(self.monitor, f"DELETE FROM {table}")
        self.world = World(self.store)
        self.workers = [self.world.worker_id, self.world.add_worker()]
        self.open_runs: list[str] = []
        #: What this example does more often than other things.
        self.favourites: list[str] = []
        self.model = Model()
        self.claims: list[Claim] = []
        self.sessions = [Session(self.store) for _ in range(SESSIONS)]
        self.ops: dict[int, Op] = {}
        self.deadlocks = 0
        self.unseen = True

    # -- sessions --------------------------------------------------------------------------------

    def start(self, op: Op | None, *, whole: bool) -> None:
        """Have an idle session begin with ``op``; ``whole``: and end it at once, unless it has to wait."""
        if op is None:
            return
        self.make_room()
        number = next(n for n in range(SESSIONS) if self.sessions[n].state == "idle")
        self.ops[number] = op
        self.sessions[number].begin(op.function, op=op.name, gated=not whole)
        self.settle()
        if whole and self.sessions[number].state == "done":
            self.end(number, commit=True)

    def make_room(self) -> None:
        """Bring sessions to their ends, the first that can go on first, until one is idle."""
        while not self.free():
            number = next(n for n in range(SESSIONS) if self.sessions[n].state in ("gate", "done"))
            if self.sessions[number].state == "gate":
                self.sessions[number].go_on()
                self.settle()
            else:
                self.end(number, commit=True)

    def end(self, number: int, *, commit: bool) -> None:
        session, op = self.sessions[number], self.ops.pop(number)
        committed = session.end(commit=commit)
        changes = self.changes()
        self.unseen |= committed
        if committed:
            self.check_owners(op, session.result, changes)
        else:
            assert not changes, f"{op.name} was rolled back, but: {changes}"
        self.settle()

    def settle(self) -> None:
        """Wait until each session has stopped or waits; see why those ended that did."""
        for number, session in enumerate(self.sessions):
            session.settle(self.monitor)
            if session.state == "refused":
                error, op = session.error, self.ops.pop(number)
                session.state = "idle"
                cause = getattr(error, "orig", None)
                if isinstance(cause, pg_errors.DeadlockDetected):
                    self.deadlocks += 1
                    raise AssertionError(
                        f"{op.name} and {[o.name for o in self.ops.values()]} lock each other out"
                    ) from error
                if not isinstance(error, REFUSALS) and not _was_killed(error):
                    raise AssertionError(f"{op.name} failed") from error

    def changes(self) -> list[Change]:
        """Return what was committed since the last time."""
        rows = query(
            self.monitor,
            """WITH gone AS (DELETE FROM test_log RETURNING *)
               SELECT coalesce(op, '') AS op, run_id::text, step_id, kind, replaced, worker_id::text, old, new, stopped
                 FROM gone ORDER BY id""",
        )
        found = [Change(*row) for row in rows]
        for change in found:
            self.seen[("run " if change.step_id is None else "step ") + change.transition] += 1
        return found

    def check_owners(self, op: Op, result: Any, changes: list[Change]) -> None:
        """What is running now is what was, with what this commit claimed and without what it ended or took away."""
        lost = {c.step_id for c in changes if c.step_id and c.old == "running"}
        for change in changes:
            if change.step_id and change.old == "running":
                assert change.step_id in self.model.owners, f"{change} ends what nobody owned"
                if op.name in TAKING:
                    assert self.model.owners[change.step_id][1] == change.worker_id
            self.note_failure(op, change)
        claimed = result.claims if op.name == "slice" else [result] if op.name == "claim" and result is not None else []
        taken = {c.step_id for c in changes if c.new == "running"}
        for claim in claimed:
            # A slice that begins is told, too, of what its process was said to run; that may be another's by now.
            known = self.model.owners.get(claim.id)
            told = op.name == "slice" and claim.id not in taken
            again = told and known is not None and claim.attempt <= known[0]
            assert known is None or again, f"{claim.id} has two owners"
        op.committed(result, changes)
        for step_id in lost:
            if op.name != "claim":
                self.model.owners.pop(step_id, None)
        rows = query(self.monitor, "SELECT id, attempt, worker_id::text FROM byrd.steps WHERE status = 'running'").all()
        assert {row.id: (row.attempt, row.worker_id) for row in rows} == self.model.owners, op.name

    def note_failure(self, op: Op, change: Change) -> None:
        run = self.model.runs[change.run_id]
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

    def pick(self, data: st.DataObject, sql: str) -> Any:
        """Draw one of the rows that are committed now."""
        rows = query(self.monitor, sql).all()
        return data.draw(st.sampled_from(rows)) if rows else None

    def free(self) -> bool:
        """Tell whether a session is idle."""
        return any(session.state == "idle" for session in self.sessions)

    # -- what people do --------------------------------------------------------------------------

    @initialize(data=st.data(), first=CANVASES, second=CANVASES)
    def begin(self, data: st.DataObject, first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
        self.favourites = data.draw(st.lists(st.sampled_from(sorted(MOVES)), max_size=4))
        for made in (first, second):
            self.submit_one(made, whole=True)

    @rule(data=st.data())
    def go_on_somehow(self, data: st.DataObject) -> None:
        """Make one of the moves that can be made."""
        self.open_runs = [row.id for row in query(self.monitor, OPEN)]
        # The first is what hypothesis does all the time in its first example.
        names = [name for name in ("work", *sorted(MOVES), *self.favourites * 2) if MOVES[name][1](self)]
        name = data.draw(st.sampled_from(names if self.open_runs else ["submit"]), label="move")
        method, _, draws = MOVES[name]
        method(self, **{key: data.draw(strategy, label=key) for key, strategy in draws.items()})

    @move(lambda self: len(self.open_runs) < 3, made=CANVASES, whole=WHOLE)
    def submit(self, made: tuple[Any, Any], whole: bool) -> None:
        self.submit_one(made, whole=whole)

    def submit_one(self, made: tuple[Any, Any], *, whole: bool) -> None:
        canvas, value = made
        run_id = str(uuid.UUID(int=len(self.model.runs) + 1))  # the same in each execution of an example
        self.model.runs[run_id] = ModelRun(value)
        plan = plan_of(canvas, shared=True)
        self.start(Op("submit", lambda conn: submit(conn, run_id, plan)), whole=whole)

    @move(whole=WHOLE)
    def command(self, data: st.DataObject, whole: bool) -> None:
        run_id = data.draw(st.sampled_from(self.open_runs * 3 + list(self.model.runs)))
        self.command_one(data, run_id, whole=whole)

    def command_one(self, data: st.DataObject, run_id: str, *, whole: bool, names: Sequence[str] = ()) -> None:
        status = query(self.monitor, "SELECT status FROM byrd.runs WHERE id = %(id)s", {"id": run_id}).scalar()
        always = ("cancel", "pause", "resume", "retry_run")
        name = data.draw(st.sampled_from(names or [*COMMANDS.get(status or "", ()), *always]))
        token = str(uuid.uuid4())
        undoing = query(self.monitor, UNDOING, {"id": run_id}).scalars().all()
        no = data.draw(st.sampled_from(undoing)) if undoing else 0
        functions: dict[str, Statement] = {
            "cancel": lambda conn: runs.cancel(conn, run_id, token=token),
            "compensate": lambda conn: runs.cancel(conn, run_id, compensate=True, token=token),
            "terminate": lambda conn: termination.cancel(conn, run_id, grace=0.0, token=token),
            "pause": lambda conn: runs.pause(conn, run_id, token=token),
            "resume": lambda conn: runs.resume(conn, run_id, token=token),
            "retry_run": lambda conn: runs.retry(conn, run_id, token=token),
            "roll_back": lambda conn: runs.roll_back(conn, run_id, token=token),
            "skip_undo": lambda conn: sagas.skip(conn, run_id, no, reason="so", token=token),
            "done_by_hand": lambda conn: sagas.done_by_hand(conn, run_id, no, note="so", token=token),
        }
        told = "cancel" if name in ("compensate", "terminate") else name
        self.start(Op(told, _if_there(functions[name], run_id)), whole=whole)

    @move(whole=WHOLE)
    def undo_on_purpose(self, data: st.DataObject, whole: bool) -> None:
        """Roll back a run that has ended, and did something that can be undone."""
        row = self.pick(data, ENDED_WELL)
        if row is not None:
            run_id, token = str(row.id), str(uuid.uuid4())
            self.start(Op("roll_back", lambda conn: runs.roll_back(conn, run_id, token=token)), whole=whole)

    @move(whole=WHOLE)
    def end_overdue_runs(self, data: st.DataObject, whole: bool) -> None:
        row = self.pick(data, "SELECT id FROM byrd.runs WHERE status IN ('running','paused') ORDER BY created_at")
        if row is None:
            return
        self.quietly(
            """UPDATE byrd.runs SET deadline = now() - interval '1 s' WHERE id IN
                 (SELECT id FROM byrd.runs WHERE id = %(id)s FOR UPDATE SKIP LOCKED)""",
            id=row.id,
        )
        self.start(Op("end_overdue_runs", lambda conn: sweeps.end_overdue_runs(conn, ERROR)), whole=whole)

    # -- what workers do -------------------------------------------------------------------------

    @move(worker=st.integers(0, 1), late=st.integers(0, 5), whole=WHOLE)
    def claim(self, data: st.DataObject, worker: int, late: int, whole: bool) -> None:
        row = self.pick(data, READY)
        if row is not None:
            gone = self.pick(data, GONE) if late > 3 else None
            self.claim_one(row, worker, row.attempt - (late == 3), gone=gone, whole=whole)

    def claim_one(self, row: Any, worker: int, attempt: int, *, whole: bool, gone: Any = None) -> None:
        token, worker_id = str(uuid.uuid4()), gone.id if gone else self.workers[worker]

        def claim(conn: Connection) -> Claim | None:
            return steps.claim(conn, row.id, attempt, task=row.task, worker_id=worker_id, pid=worker, token=token)

        def committed(result: Claim | None, _changes: list[Change]) -> None:
            if result is not None:
                assert result.attempt == attempt + 1
                # Unless a heartbeat was under way, and has come through since.
                assert gone is None or gone not in query(self.monitor, GONE).all(), "a worker that is gone has claimed"
                self.model.owners[result.id] = (result.attempt, worker_id)
                self.claims.append(result)

        self.start(Op("claim", claim, committed), whole=whole)

    @move(lambda self: self.claims, how=st.sampled_from(ENDS), whole=WHOLE)
    def end_attempt(self, data: st.DataObject, how: str, whole: bool) -> None:
        self.end_one(self.draw_claim(data), how, whole=whole)

    def end_one(self, claim: Claim, how: str, *, whole: bool) -> None:
        if how == "time_out":
            self.quietly(
                """UPDATE byrd.steps SET options = %(o)s WHERE id IN
                     (SELECT id FROM byrd.steps WHERE id = %(id)s AND status = 'running' FOR UPDATE SKIP LOCKED)""",
                o=TIMED[claim.attempt % 3], id=claim.id,
            )  # fmt: skip
        args = {"complete": [json.dumps(claim.task)], "fail": [ERROR], "retry": [ERROR], "ignore": [ERROR]}.get(how, [])

        def end(conn: Connection) -> Any:
            if how == "revoke":
                return steps.revoke(conn, claim.id, "revoked", attempt=claim.attempt)
            if how == "time_out":
                return timeouts.time_out(conn, claim.id, claim.attempt, max_preemptions=1)
            if how == "put_back":
                row = query(conn, "SELECT worker_id, pid FROM byrd.steps WHERE id = %(id)s", {"id": claim.id}).first()
                where = {"worker_id": row.worker_id, "pid": row.pid} if row else {"worker_id": None, "pid": 0}
                return steps.put_back(conn, claim.id, claim.attempt, **where)
            return getattr(steps, how)(conn, claim.id, claim.attempt, *args)

        self.start(Op(how, end, self.ended(claim, how)), whole=whole)

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

    @move(worker=st.integers(0, 1), most=st.integers(0, 3), others=st.booleans(), whole=WHOLE)
    def slice(self, data: st.DataObject, worker: int, most: int, others: bool, whole: bool) -> None:
        """Record some results, claim what follows, and others: all in one statement, of whichever runs."""
        drawn = data.draw(st.lists(st.sampled_from(self.claims), max_size=4, unique=True)) if self.claims else []
        joins: dict[str, int] = {}  # no two joins of one run
        ends = [c for c in drawn if c.join_no is None or joins.setdefault(c.run_id, c.join_no) == c.join_no]
        ends = list({c.id: c for c in ends if c.kind in ("task", "callback")}.values())  # nor a step twice
        row = self.pick(data, READY) if others else None
        self.quietly(
            """UPDATE byrd.workers SET shares = (SELECT array_agg(DISTINCT task) FROM byrd.steps) WHERE id IN
                 (SELECT id FROM byrd.workers WHERE id = %(id)s FOR NO KEY UPDATE SKIP LOCKED)""",
            id=self.workers[worker],
        )
        worker_id, token = self.workers[worker], str(uuid.uuid4())

        def act(conn: Connection) -> Work:
            try:
                return work.work(
                    conn, worker_id=worker_id, pid=worker, token=token, most=most, others=others,
                    done=[Done(claim, json.dumps(claim.task)) for claim in ends],
                    own=Own(row.id, row.attempt, row.task) if row else None,
                )  # fmt: skip
            except DBAPIError as exc:
                if work.is_unusual(exc):
                    raise StaleAttempt("it is to be done one by one") from exc
                raise

        def committed(found: Work, changes: list[Change]) -> None:
            # It is told, too, of what its process was said to run; that may have ended before this commit.
            taken = {c.step_id for c in changes if c.new == "running"}
            new = [c for c in found.claims if c.id in taken]
            assert all(c in new or c.attempt <= self.model.owners.get(c.id, (c.attempt,))[0] for c in found.claims)
            assert len(new) <= most
            ended = {c.step_id for c in changes if c.old == "running"}
            for claim in ends:
                owns = self.model.owners.get(claim.id, (0,))[0] == claim.attempt
                assert owns == (claim.id in ended), f"attempt {claim.attempt} of {claim.id}, owner or not: {changes}"
                assert not (owns and claim.id in found.refused)
            for claim in new:
                self.model.owners[claim.id] = (claim.attempt, worker_id)
                self.claims.append(claim)

        self.start(Op("slice", act, committed), whole=whole)

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

    @move(lambda self: self.owned(), how=st.sampled_from(["hand_back", "retry"]))
    def claim_again(self, data: st.DataObject, how: str) -> None:
        """Give a step to a later attempt; the one before is still there."""
        claim = data.draw(st.sampled_from(self.owned()))
        self.end_one(claim, how, whole=True)
        row = query(self.monitor, f"SELECT * FROM ({READY}) ready WHERE id = %(id)s", {"id": claim.id}).first()
        if row is not None:
            self.claim_one(row, 1, row.attempt, whole=True)

    def retry_one(self, run_id: str, *, whole: bool) -> None:
        self.start(Op("retry_run", lambda conn: runs.retry(conn, run_id)), whole=whole)

    @move(lambda self: self.claims, whole=WHOLE)
    def obey(self, data: st.DataObject, whole: bool) -> None:
        """Look, at a checkpoint, whether to stop, and do so."""
        ids = {row.id for row in query(self.monitor, TOLD)}
        told = [claim for claim in self.claims if claim.id in ids]
        claim = data.draw(st.sampled_from(told)) if told else self.draw_claim(data)
        stop = progress.stop_reason(self.monitor, claim.id, claim.attempt)
        name = {"StepCancelled": "abandon", "StepHandedBack": "hand_back"}.get(type(stop).__name__)
        if name is not None:
            self.start(
                Op(name, lambda conn: getattr(steps, name)(conn, claim.id, claim.attempt), self.ended(claim, name)),
                whole=whole,
            )

    @move(lambda self: self.claims, whole=WHOLE)
    def end_by_force(self, data: st.DataObject, whole: bool) -> None:
        """End an attempt whose run is cancelled with terminate, or another one."""
        ids = {row.id for row in query(self.monitor, DOOMED)}
        doomed = [claim for claim in self.claims if claim.id in ids]
        claim = data.draw(st.sampled_from(doomed)) if doomed else self.draw_claim(data)
        if not doomed and whole and claim in self.owned():
            cancel = _if_there(lambda conn: termination.cancel(conn, claim.run_id, grace=0.0), claim.run_id)
            self.start(Op("cancel", cancel), whole=True)
            if not self.free():
                return
        row = query(
            self.monitor, "SELECT worker_id::text, pid FROM byrd.steps WHERE id = %(id)s", {"id": claim.id}
        ).first()
        if row is None or row.worker_id is None:
            return
        one, worker_id = termination.Doomed(claim.id, claim.attempt, row.pid), row.worker_id

        def end(conn: Connection) -> Any:
            return termination.terminate(conn, one, worker_id=worker_id, ended=True)

        self.start(Op("terminate", end, self.ended(claim, "terminate")), whole=whole)

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
                assert self.model.owners.get(claim.id, (0,))[0] == claim.attempt
                self.model.runs[claim.run_id].value = None
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
            assert self.model.owners[claim.id][0] == claim.attempt, "a stale attempt wrote progress"
            assert not changes

        self.start(Op("progress", write, committed), whole=whole)

    @move(how=st.sampled_from(["revoke", "expire"]), whole=WHOLE)
    def drop_ready(self, data: st.DataObject, how: str, whole: bool) -> None:
        row = self.pick(data, READY)
        if row is None:
            return
        if how == "expire":
            self.quietly(
                """UPDATE byrd.steps SET expires_at = now() - interval '1 s' WHERE id IN
                     (SELECT id FROM byrd.steps WHERE id = %(id)s AND attempt = 0 AND kind <> 'compensation'
                        FOR UPDATE SKIP LOCKED)""",
                id=row.id,
            )
            self.start(Op(how, lambda conn: steps.expire(conn, row.id)), whole=whole)
        else:
            self.start(Op(how, lambda conn: steps.revoke(conn, row.id, "revoked")), whole=whole)

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

    @move(one=st.booleans(), whole=WHOLE)
    def end_waits(self, data: st.DataObject, one: bool, whole: bool) -> None:
        row = self.pick(data, WAITS) if one else None
        if row is None:
            self.start(Op("end_waits", waits.end_due), whole=whole)
        else:
            self.start(Op("end_waits", lambda conn: waits.end_due_of(conn, row.run_id)), whole=whole)

    @move(whole=WHOLE)
    def revoke_wait(self, data: st.DataObject, whole: bool) -> None:
        row = self.pick(data, f"{WAITS} LIMIT 5")
        if row is not None and data.draw(st.integers(0, 3)) == 0:
            self.start(Op("revoke", lambda conn: steps.revoke_waiting(conn, row.id)), whole=whole)

    # -- what the workers' threads do --------------------------------------------------------------

    @move(
        worker=st.integers(0, 1),
        name=st.sampled_from(["heartbeat", *["stop_worker"] * 2, *TAKING]),
        most=st.sampled_from([0, 1000]),
        whole=WHOLE,
    )
    def worker_does(self, worker: int, name: str, most: int, data: st.DataObject, whole: bool) -> None:
        worker_id = self.workers[worker]
        claim = self.draw_claim(data) if self.claims else None
        step = (claim.id, claim.attempt) if claim else ("", 1)

        def preempt(**which: Any) -> Statement:
            return lambda conn: steps.preempt(conn, worker_id, reason="gone", max_preemptions=most, **which)

        functions: dict[str, Statement] = {
            "heartbeat": lambda conn: _heartbeat(conn, worker_id),
            "stop_worker": lambda conn: sweeps.stop_worker(conn, worker_id),
            "release_worker": lambda conn: sweeps.release_worker(conn, worker_id, reason="stopped"),
            "recover": lambda conn: sweeps.recover(conn, max_preemptions=most),
            "preempt": preempt(),
            "preempt_process": preempt(pid=worker),
            "preempt_step": preempt(step=step),
        }
        if name == "recover":
            self.quietly(
                """UPDATE byrd.workers SET lease_until = now() - interval '1 s' WHERE id IN
                     (SELECT id FROM byrd.workers WHERE id = %(id)s FOR UPDATE SKIP LOCKED)""",
                id=worker_id,
            )

        def committed(_result: Any, changes: list[Change]) -> None:
            taken = {change.worker_id for change in changes if change.step_id and change.old == "running"}
            alive = {row.id for row in query(self.monitor, ALIVE)} if name == "recover" else taken - {worker_id}
            assert not taken & alive, f"{name} took steps of other workers: {changes}"

        self.start(Op(name, functions[name], committed), whole=whole)
        if name in ("recover", "release_worker", "stop_worker"):
            self.workers[worker] = self.world.add_worker()

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

    @move(
        lambda self: sum(session.state == "idle" for session in self.sessions) > 1 and self.model.owners,
        hows=st.tuples(st.sampled_from(ENDS), st.sampled_from(ENDS)),
        turns=st.lists(st.booleans(), max_size=16),
    )
    def collide(self, data: st.DataObject, hows: tuple[str, str], turns: list[bool]) -> None:
        """End two attempts of one run side by side, or one while somebody gives a command; then commit both."""
        owned = self.owned()
        first = data.draw(st.sampled_from(owned))
        others = [c for c in owned if c.run_id == first.run_id and c is not first]
        pair = [n for n in range(SESSIONS) if self.sessions[n].state == "idle"][:2]
        self.end_one(first, hows[0], whole=False)
        if others and turns[:1] != [True]:
            self.end_one(data.draw(st.sampled_from(others)), hows[1], whole=False)
        else:
            self.command_one(data, first.run_id, whole=False)
        for turn in turns:
            if self.sessions[pair[turn]].state == "gate":
                self.sessions[pair[turn]].go_on()
                self.settle()
        for _ in pair:
            for number in pair:
                while self.sessions[number].state == "gate":
                    self.sessions[number].go_on()
                    self.settle()
            for number in pair:
                if self.sessions[number].state == "done":
                    self.end(number, commit=True)

    # -- what befalls sessions ---------------------------------------------------------------------

    @move(
        lambda self: any(session.state == "gate" for session in self.sessions), most=st.sampled_from([1, 1, 2, 5, 100])
    )
    def go_on(self, data: st.DataObject, most: int) -> None:
        session = data.draw(st.sampled_from([s for s in self.sessions if s.state == "gate"]))
        for _ in range(most):
            if session.state != "gate":
                break
            session.go_on()
            self.settle()

    @move(
        lambda self: any(session.state == "done" for session in self.sessions),
        commit=st.sampled_from([True, True, True, False]),
    )
    def finish(self, data: st.DataObject, commit: bool) -> None:
        self.end(
            data.draw(st.sampled_from([n for n in range(SESSIONS) if self.sessions[n].state == "done"])), commit=commit
        )

    @move(lambda self: any(session.state != "idle" for session in self.sessions), really=st.integers(0, 2))
    def kill(self, data: st.DataObject, really: int) -> None:
        if really == 0:
            self.drop(data.draw(st.sampled_from([n for n in range(SESSIONS) if self.sessions[n].state != "idle"])))

    def drop(self, number: int) -> None:
        self.sessions[number].kill(self.monitor)
        del self.ops[number]
        assert not self.changes(), "a killed session's work is there"
        self.settle()

    # -- helpers -----------------------------------------------------------------------------------

    def draw_claim(self, data: st.DataObject) -> Claim:
        """Draw an attempt: mostly one that owns its step, or one whose step runs in a later attempt."""
        owned, others = (
            self.owned(),
            [c for c in self.claims if self.model.owners.get(c.id, (c.attempt,))[0] > c.attempt],
        )
        kinds = [kind for kind in (owned, owned, others, self.claims) if kind]
        return data.draw(st.sampled_from(data.draw(st.sampled_from(kinds))))

    def owned(self) -> list[Claim]:
        """Return the attempts that own their steps."""
        return [c for c in self.claims if self.model.owners.get(c.id, (0,))[0] == c.attempt]

    def ended(self, claim: Claim, how: str) -> Callable[[Any, list[Change]], None]:
        """Return the check of an outcome's commit: it was the owner's, or it changed nothing."""
        before = how

        def committed(_result: Any, changes: list[Change]) -> None:
            owner = self.model.owners.get(claim.id)
            if owner is None or owner[0] != claim.attempt:
                assert before == "revoke" or not changes, f"{how} of an attempt that owns nothing: {changes}"

        return committed

    def quietly(self, sql: str, **params: Any) -> None:
        """Change what only time changes, where no session holds the row."""
        query(self.monitor, sql, params)
        self.unseen = True

    # -- what must be ------------------------------------------------------------------------------

    @invariant()
    def tables_are_right(self) -> None:
        if self.unseen:  # what is not committed, nobody sees
            check_invariants(self.monitor)
        self.unseen = False

    def teardown(self) -> None:
        try:
            while busy := [n for n in range(SESSIONS) if self.sessions[n].state != "idle"]:
                self.drop(busy[0])
        finally:
            for session in self.sessions:
                session.close()
        self.world.sql("UPDATE byrd.workers SET lease_until = now() - interval '1 s'")
        while self.world.sql("SELECT 1 FROM byrd.steps WHERE status = 'running'"):
            self.world.do(sweeps.recover, max_preemptions=1000)
        self.world.worker_id = self.world.add_worker()
        there = {str(row.id) for row in self.world.sql("SELECT id FROM byrd.runs")}
        for run_id, run in self.model.runs.items():
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


def _if_there(function: Statement, run_id: str) -> Statement:
    """Skip a command on a run whose submission is not committed."""

    def act(conn: Connection) -> Any:
        if query(conn, "SELECT 1 FROM byrd.runs WHERE id = %(id)s", {"id": run_id}).first() is None:
            raise StaleAttempt("there is no such run yet")
        return function(conn)

    return act


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


def _heartbeat(conn: Connection, worker_id: str) -> None:
    sweeps.heartbeat(
        conn, worker_id, lease_seconds=3600, hostname="w@host", pid=1, pool="solo", concurrency=1, queues=["work"],
        tasks=[], version="0",
    )  # fmt: skip


def _was_killed(error: BaseException | None) -> bool:
    return isinstance(error, DBAPIError) and (
        error.connection_invalidated or isinstance(error.orig, pg_errors.AdminShutdown | pg_errors.LockNotAvailable)
    )


@pytest.fixture
def noted_store(database_url: str) -> Iterator[Store]:
    """A store whose tables note their changes."""
    store = Store(database_url, pool_size=10)
    store.run(query, LOG.replace("%", "%%"))
    undo = gates(store)
    yield store
    undo()
    store.close()


#: Rounds of examples: at least so many, and more until the rarest transitions have been seen.
FEWEST, MOST = (3, 24) if EXAMPLES < 100 else (1, 24)
#: No task has a limit here: test_limits.py has a course of its own for these.
WANTED = {f"run {t.name}" for t in RUN_TRANSITIONS} | {f"step {t.name}" for t in STEP_TRANSITIONS}
WANTED -= {"step put_off"}


@pytest.mark.timeout(3600 if EXAMPLES > 100 else 1500)
def test_all_transitions_in_any_interleaving_of_three_sessions(noted_store: Store) -> None:
    seen: Counter[str] = Counter()
    with noted_store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as monitor:
        for number in range(MOST):
            machine = type("Machine", (InterleavingMachine,), {"store": noted_store, "monitor": monitor, "seen": seen})
            # The same ones in every test run; others when one explores.
            seeded = seed(number)(machine) if EXAMPLES < 100 else machine
            run_state_machine_as_test(seeded, settings=SETTINGS)
            if number + 1 >= FEWEST and seen.keys() >= WANTED:
                break
    assert seen.keys() >= WANTED, f"never seen: {sorted(WANTED - seen.keys())}; seen: {sorted(seen.items())}"


SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    # Sessions that wait for each other do not shrink well: what failed is told by the steps that led there.
    phases=[Phase.generate],
)


def test_a_run_whose_callback_was_revoked_says_why_it_failed(world: World) -> None:
    """What the interleavings found: the output was there, nothing had failed, and the error was lost."""
    canvas = sig("a")
    canvas.link(sig("told"))
    run = world.submit(canvas)
    world.settle(world.claim(run, "a"))
    world.do(steps.revoke, world.step(run, "told").id, "revoked")
    row = world.run(run)
    assert (row.status, json.loads(row.error or "{}").get("exc_message")) == ("failed", ["revoked"])
