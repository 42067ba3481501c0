"""Sessions at work on one database, statement by statement: what random interleavings need, whatever is in them.

Three sessions hold their transactions open: any of them may go on by one statement, wait for another's locks, commit,
roll back or be killed while the others are anywhere in theirs.  A trigger notes each change of a status, and each of a
row that was final, with the transaction, so that what was committed is known exactly: the former have to be in the
tables of :mod:`byrd.model`; the latter must not be.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition, HypothesisException
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from psycopg2 import errors as pg_errors
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from byrd.errors import IllegalTransitionError, StaleAttempt, StepCancelled
from byrd.model import RUN_TRANSITIONS, STEP_TRANSITIONS, Transition
from byrd.store import Claim, Store
from byrd.store.plans import RunVanishedError
from byrd.store.rows import query
from tests.invariants import check_invariants
from tests.store.sessions import Session, Statement
from tests.store.world import World

#: Set to explore for longer than the test run can wait.
EXAMPLES = int(os.environ.get("BYRD_MODEL_EXAMPLES", "6"))
SESSIONS = 3
OPEN = "SELECT id::text FROM byrd.runs WHERE finished_at IS NULL ORDER BY created_at"
#: Whether an operation is carried out at once, or statement by statement between those of others.
WHOLE = st.sampled_from([True, True, False])
REFUSALS = (StaleAttempt, StepCancelled, IllegalTransitionError, RunVanishedError)
#: What ends waits.
ENDING = ("signal", "end_waits")
#: What stops runs.
STOPPING = ("cancel", "roll_back", "end_overdue_runs")
#: What takes steps away from workers.
TAKING = ("preempt", "preempt_process", "preempt_step", "recover", "release_worker")

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
                        OR NEW.kind = 'item' AND NEW.status = 'cancelled' AND NEW.cause IS NOT NULL
                        OR NEW.kind = 'saga' AND NEW.status = 'cancelled' AND NEW.cause IS NOT NULL);
  END IF;
  RETURN NULL;
END $$;
-- Of a run that has ended it may change which step it is the work of, and whether that was told.
CREATE TRIGGER test_note AFTER UPDATE ON byrd.runs FOR EACH ROW
  WHEN (OLD.status <> NEW.status OR OLD.finished_at IS NOT NULL
        AND to_jsonb(OLD) - ARRAY['parent_step','parent_told','key']
            IS DISTINCT FROM to_jsonb(NEW) - ARRAY['parent_step','parent_told','key'])
  EXECUTE FUNCTION test_note();
CREATE TRIGGER test_note AFTER UPDATE ON byrd.steps FOR EACH ROW
  WHEN (OLD.status <> NEW.status OR OLD.finished_at IS NOT NULL AND OLD.* IS DISTINCT FROM NEW.*)
  EXECUTE FUNCTION test_note();
"""


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
    #: It was cancelled because its saga, or its each, has failed.
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


@dataclass
class Op:
    """What a session is doing, and what is true once that is committed."""

    name: str
    function: Statement
    #: Called with the result and with what was changed.
    committed: Callable[[Any, list[Change]], None] = lambda _result, _changes: None
    #: What it is to the part of a canvas that does it.
    part: str = ""
    #: How much had been committed when it began.
    since: int = 0


Method = TypeVar("Method", bound=Callable[..., None])
Move = tuple[Callable[..., None], Callable[[Any], Any], dict[str, st.SearchStrategy[Any]]]


def move(
    when: Callable[[Any], Any] = lambda _machine: True, **draws: st.SearchStrategy[Any]
) -> Callable[[Method], Method]:
    """Let a method be one of its machine's moves: ``when`` it may happen, and what is drawn for it.

    They are no rules of their own, for hypothesis leaves many rules out of each example: then sessions stay where they
    are, say, or nothing is submitted any more, and the rest of the example is wasted.
    """

    def mark(method: Method) -> Method:
        if "data" in inspect.signature(method).parameters:
            draws["data"] = st.data()
        method.move = when, draws  # type: ignore[attr-defined]
        return method

    return mark


class Interleavings(RuleBasedStateMachine):
    """Sessions at work on a few runs; a machine of its own adds the moves, and what they must come to."""

    store: Store
    monitor: Connection
    seen: Counter[str]
    moves: ClassVar[dict[str, Move]]
    #: Moves that are made more often than others, each as many times as it is here.
    often: ClassVar[tuple[str, ...]] = ()
    #: What an example has failed with.
    failed: ClassVar[Exception | None] = None

    def __init_subclass__(cls) -> None:
        found = {name: getattr(cls, name) for name in dir(cls)}
        cls.moves = {name: (made, *made.move) for name, made in found.items() if hasattr(made, "move")}

    def __init__(self) -> None:
        super().__init__()
        for table in ("byrd.runs", "byrd.workers", "test_log"):
            query(self.monitor, f"DELETE FROM {table}")
        self.world = World(self.store)
        self.workers = [self.world.worker_id, self.world.add_worker()]
        self.open_runs: list[str] = []
        #: What this example does more often than other things.
        self.favourites: list[str] = []
        #: Which attempt of which worker owns which step.
        self.owners: dict[str, tuple[int, str]] = {}
        self.claims: list[Claim] = []
        self.sessions = [Session(self.store) for _ in range(SESSIONS)]
        self.ops: dict[int, Op] = {}
        self.commits = 0
        self.unseen = True

    # -- sessions --------------------------------------------------------------------------------

    def start(self, op: Op | None, *, whole: bool) -> None:
        """Have an idle session begin with ``op``; ``whole``: and end it at once, unless it has to wait."""
        if op is None:
            return
        self.make_room()
        number = next(n for n in range(SESSIONS) if self.sessions[n].state == "idle")
        self.ops[number], op.since = op, self.commits
        self.sessions[number].begin(op.function, op=op.name, gated=not whole)
        self.settle()
        if whole and self.sessions[number].state == "done":
            self.end(number, commit=True)

    def make_room(self, wanted: int = 1) -> None:
        """Bring sessions to their ends, the first that can go on first, until so many are idle."""
        while len(self.idle()) < wanted:
            number = next((n for n in range(SESSIONS) if self.sessions[n].state in ("gate", "done")), None)
            if number is None:  # they wait for each other: Postgres is about to find out
                self.settle()
            elif self.sessions[number].state == "gate":
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
            self.commits += 1
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
                    raise AssertionError(
                        f"{op.name} and {[o.name for o in self.ops.values()]} lock each other out"
                    ) from error
                if not isinstance(error, REFUSALS) and not _was_killed(error):
                    raise AssertionError(f"{op.name} failed") from error
                self.refused(op, error)

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
                assert change.step_id in self.owners, f"{change} ends what nobody owned"
                if op.name in TAKING:
                    assert self.owners[change.step_id][1] == change.worker_id
            self.note(op, change)
        claimed = result.claims if op.name == "slice" else [result] if op.name == "claim" and result is not None else []
        taken = {c.step_id for c in changes if c.new == "running"}
        for claim in claimed:
            # A slice that begins is told, too, of what its process was said to run; that may be another's by now.
            known = self.owners.get(claim.id)
            told = op.name == "slice" and claim.id not in taken
            again = told and known is not None and claim.attempt <= known[0]
            assert known is None or again, f"{claim.id} has two owners"
        op.committed(result, changes)
        for step_id in lost:
            if op.name != "claim":
                self.owners.pop(step_id, None)
        rows = query(self.monitor, "SELECT id, attempt, worker_id::text FROM byrd.steps WHERE status = 'running'").all()
        assert {row.id: (row.attempt, row.worker_id) for row in rows} == self.owners, op.name

    def note(self, op: Op, change: Change) -> None:
        """Learn from a change that was committed."""

    def refused(self, op: Op, error: BaseException | None) -> None:
        """Learn that the store has refused something, or that its session was killed."""

    def pick(self, data: st.DataObject, sql: str) -> Any:
        """Draw one of the rows that are committed now."""
        rows = query(self.monitor, sql).all()
        return data.draw(st.sampled_from(rows)) if rows else None

    def idle(self) -> list[int]:
        """Return the sessions that do nothing."""
        return [n for n in range(SESSIONS) if self.sessions[n].state == "idle"]

    def free(self) -> bool:
        """Tell whether a session is idle."""
        return bool(self.idle())

    @rule(data=st.data())
    def go_on_somehow(self, data: st.DataObject) -> None:
        """Make one of the moves that can be made."""
        self.open_runs = [row.id for row in query(self.monitor, OPEN)]
        # The first is what hypothesis does all the time in its first example.
        names = ["work", *sorted(self.moves), *self.favourites * 2, *self.often]
        names = [name for name in names if self.moves[name][1](self)]
        name = data.draw(st.sampled_from(names if self.open_runs else ["submit"]), label="move")
        method, _, draws = self.moves[name]
        method(self, **{key: data.draw(strategy, label=key) for key, strategy in draws.items()})

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

    def take_turns(self, pair: Sequence[int], turns: Sequence[bool], commits: Sequence[bool] = (True, True)) -> None:
        """Let two sessions go on by a statement each, in turn; then bring both to their ends."""
        for turn in turns:
            if self.sessions[pair[turn]].state == "gate":
                self.sessions[pair[turn]].go_on()
                self.settle()
        for _ in pair:
            for number in pair:
                while self.sessions[number].state == "gate":
                    self.sessions[number].go_on()
                    self.settle()
            for number, commit in zip(pair, commits, strict=True):
                if self.sessions[number].state == "done":
                    self.end(number, commit=commit)

    # -- helpers -----------------------------------------------------------------------------------

    def draw_claim(self, data: st.DataObject, among: Sequence[Claim] | None = None) -> Claim:
        """Draw an attempt: mostly one that owns its step, or one whose step runs in a later attempt."""
        claims = self.claims if among is None else among
        owned = [c for c in claims if self.owns(c)]
        others = [c for c in claims if self.owners.get(c.id, (c.attempt,))[0] > c.attempt]
        kinds = [kind for kind in (owned, owned, others, claims) if kind]
        return data.draw(st.sampled_from(data.draw(st.sampled_from(kinds))))

    def owned(self) -> list[Claim]:
        """Return the attempts that own their steps."""
        return [c for c in self.claims if self.owns(c)]

    def owns(self, claim: Claim) -> bool:
        """Tell whether an attempt owns its step."""
        return self.owners.get(claim.id, (0,))[0] == claim.attempt

    def ended(self, claim: Claim, how: str) -> Callable[[Any, list[Change]], None]:
        """Return the check of an outcome's commit: it was the owner's, or it changed nothing."""
        before = how

        def committed(_result: Any, changes: list[Change]) -> None:
            owner = self.owners.get(claim.id)
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
            self.check_tables()
        self.unseen = False

    def check_tables(self) -> None:
        """Check what must hold at any moment."""
        check_invariants(self.monitor)

    def teardown(self) -> None:
        error = sys.exception()
        try:
            if isinstance(error, Exception) and not isinstance(error, HypothesisException):
                raise error
            self.drop_all()
            self.come_to_ends()
        except Exception as found:
            type(self).failed = type(self).failed or found  # the first tells most
            raise
        finally:
            for session in self.sessions:
                session.close()

    def come_to_ends(self) -> None:
        """Bring all runs to their ends, and check what they have come to."""

    def drop_all(self) -> None:
        """Kill whatever is under way."""
        while busy := [n for n in range(SESSIONS) if self.sessions[n].state != "idle"]:
            self.drop(busy[0])


def _was_killed(error: BaseException | None) -> bool:
    return isinstance(error, DBAPIError) and (
        error.connection_invalidated or isinstance(error.orig, pg_errors.AdminShutdown | pg_errors.LockNotAvailable)
    )


SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    # Sessions that wait for each other do not shrink well: what failed is told by the steps that led there.
    phases=[Phase.generate],
)


#: Rounds of examples: at least so many, and more until the rarest transitions have been seen.
FEWEST, MOST = (3, 24) if EXAMPLES < 100 else (1, 24)


def explore(kind: type[Interleavings], store: Store, wanted: set[str], *, fewest: int = FEWEST) -> None:
    """Try examples of a machine until all that is wanted was seen."""
    seen: Counter[str] = Counter()
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as monitor:
        for number in range(MOST):
            machine: type[Interleavings] = type("Machine", (kind,), {"store": store, "monitor": monitor, "seen": seen})
            # The same ones in every test run; others when one explores.
            seeded = seed(number)(machine) if EXAMPLES < 100 else machine
            try:
                run_state_machine_as_test(seeded, settings=SETTINGS)
            except FlakyStrategyDefinition:
                # Which of several that wait comes first is Postgres's affair: then two examples that begin alike do
                # not go on so, which hypothesis does not like.  It makes no more of these.
                if machine.failed is not None:
                    raise machine.failed from None
            if number + 1 >= fewest and seen.keys() >= wanted:
                break
    assert seen.keys() >= wanted, f"never seen: {sorted(wanted - seen.keys())}; seen: {sorted(seen.items())}"
