"""Random interleavings of what takes more than one transaction, statement by statement.

Eaches and their items, workflows within others and their rollbacks, bulk jobs, schedules that fire, checkpoint tasks
that sleep and wait.  :mod:`tests.store.interleavings` says how; here each change is a transition of the tables, too.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from celery import chain, group
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from sqlalchemy import Connection

import byrd
from byrd.errors import ControlFlow, StaleAttempt, StepCancelled
from byrd.store import Claim, Store, bulk, children, items, plans, progress, runs, sagas, steps, sweeps, undo, waits
from byrd.store.children import Unstuck
from byrd.store.rows import query
from byrd.waits import SUBWORKFLOW, WORKFLOW_NAME
from tests.store import parts
from tests.store.interleavings import EXAMPLES, OPEN, WHOLE, Change, Op, explore, move
from tests.store.parts import ACTIONS, LONG, NAPPER, PARTS, TASKS, WITHIN, Known, Part, each_over, inner, nap, wait
from tests.store.sessions import apart
from tests.store.traffic import ENDS, READY, Traffic
from tests.store.world import plan_of, sig, submit

#: How many rounds it takes, at most, until all runs have ended that nobody disturbs any more.
ROUNDS = 60
#: Transitions that end an attempt: what it would do after them is the same again.
LAST = ("complete", "fail", "hand_back")
#: Which ready steps somebody takes.
WHICH = {
    "any": "true",
    "items": "kind = 'item'",
    "within": "run_id IN (SELECT id FROM byrd.runs WHERE parent_step IS NOT NULL)",
    "undoing": "kind = 'compensation'",
    "parts": "task LIKE 'byrd.%%' OR task = 'napper'",
}
#: What is done beside an attempt at a part: mostly it is the attempt itself that goes on.
ACTS = (*["part"] * 6, *["step"] * 4, "claim", "drop", "command", "command", "signal", "signal", "tell", "end")
#: How attempts end, mostly well; or their process goes on.
HOW = (*["complete"] * 9, *["leave"] * 5, *ENDS[4:])
#: Of these, those that can be claimed.
DUE = "wake_at < 'infinity' AND run_at <= clock_timestamp()"
#: Runs that have others within, and something to undo in one of these.
FAMILIES = """SELECT r.id::text, r.status FROM byrd.runs r
   WHERE r.pivot IS NULL AND r.status IN ('running','succeeded','failed','cancelled') AND EXISTS
     (SELECT 1 FROM byrd.steps o JOIN byrd.runs c ON c.parent_step = o.id AND c.pivot IS NULL
        JOIN byrd.steps s ON s.run_id = c.id AND s.compensation IS NOT NULL AND s.status = 'succeeded'
       WHERE o.run_id = r.id) ORDER BY r.id"""
#: Runs within others that go on.
WITHIN_OTHERS = "SELECT id::text FROM byrd.runs WHERE status = 'running' AND parent_step IS NOT NULL ORDER BY id"
#: Runs that can be tried again, as can those within them.
FAILED_WITH_OTHERS = """SELECT r.id::text FROM byrd.runs r WHERE r.status IN ('failed','cancelled') AND EXISTS
    (SELECT 1 FROM byrd.steps s JOIN byrd.runs c ON c.parent_step = s.id AND c.status IN ('failed','cancelled')
      WHERE s.run_id = r.id AND NOT EXISTS (SELECT 1 FROM byrd.steps u WHERE u.run_id IN (r.id, c.id)
                                               AND u.kind = 'compensation')) ORDER BY r.id"""
#: Runs within others whose rollback is stuck.
STUCK = """SELECT id::text FROM byrd.runs WHERE status = 'rollback_stuck' AND parent_step IS NOT NULL ORDER BY id"""
ASLEEP = """SELECT s.id FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
             WHERE s.status = 'ready' AND s.run_at > clock_timestamp() AND s.run_at < 'infinity'
             ORDER BY s.task, s.no, r.id"""
AWAITED = """SELECT r.id::text, s.signal FROM byrd.steps s JOIN byrd.runs r ON r.id = s.run_id
              WHERE r.finished_at IS NULL AND s.signal IS NOT NULL AND s.status IN ('pending','ready','waiting')
              ORDER BY s.signal, r.id, s.no"""

#: Notes who writes checkpoints and signals, which are no statuses.
WRITES = """
CREATE TABLE test_writes (id bigint GENERATED ALWAYS AS IDENTITY, op text, what text);
CREATE FUNCTION test_write() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF current_setting('test.op', true) <> '' THEN
    INSERT INTO test_writes (op, what) VALUES (current_setting('test.op', true), TG_TABLE_NAME);
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER test_write AFTER INSERT OR UPDATE OR DELETE ON byrd.checkpoints FOR EACH ROW
  EXECUTE FUNCTION test_write();
CREATE TRIGGER test_write AFTER INSERT OR UPDATE ON byrd.signals FOR EACH ROW EXECUTE FUNCTION test_write();
CREATE TABLE test_schedule (fired int);
"""
_PUT_OFF = """UPDATE byrd.steps SET run_at = run_at + interval '1 day' WHERE id IN (SELECT id FROM byrd.steps
    WHERE status = 'ready' AND run_at > now() AND run_at < now() + interval '1 hour' FOR UPDATE SKIP LOCKED)"""
_HELD = """(SELECT value FROM byrd.checkpoints WHERE starts_with(name, 'step:wait_for') AND starts_with(value, '"p')
            UNION ALL
            SELECT result FROM byrd.steps WHERE kind = 'wait' AND starts_with(result, '"p'))"""
#: What must hold of the parts at any moment, beside what must of all: each finds what breaks it.
RULES = {
    "an each has no more items under way than its call says": """
        SELECT s.run_id, s.no, m.n FROM byrd.steps s, LATERAL
          (SELECT count(*) AS n FROM byrd.steps m WHERE m.run_id = s.run_id AND m.join_no = s.no AND m.kind = 'item'
              AND m.status IN ('ready','running')) m
         WHERE s.task = 'byrd.each' AND m.n > (s.kwargs::json ->> 'limit')::int""",
    "each item is there once": """
        SELECT run_id, join_no, count(*) FROM byrd.steps WHERE kind = 'item' GROUP BY run_id, join_no
        HAVING count(DISTINCT join_pos) <> count(*) OR max(join_pos) <> count(*) - 1
            OR NOT bool_and(args::json ->> 0 = 'i' || join_pos)""",
    "a step has one run": """
        SELECT parent_step, count(*) FROM byrd.runs WHERE parent_step IS NOT NULL GROUP BY 1 HAVING count(*) > 1""",
    "a due time has one run": """
        SELECT workflow, key, count(*) FROM byrd.runs WHERE key IS NOT NULL GROUP BY 1, 2 HAVING count(*) > 1""",
    "a signal is taken once": f"SELECT value, count(*) FROM {_HELD} held GROUP BY 1 HAVING count(*) > 1",
    "a signal was delivered if somebody has it": f"""
        SELECT g.id, g.payload FROM byrd.signals g
         WHERE (g.delivered_at IS NOT NULL) <> (g.payload IN (SELECT value FROM {_HELD} held))""",
}


# -- what is submitted -------------------------------------------------------------------------------


@st.composite
def _each(draw: Any) -> Any:
    made = each_over(
        draw(st.sampled_from([0, 1, 3, 4, 5, 6])), pages=draw(st.booleans()),
        task=draw(st.sampled_from(["item", "item", "sagaitem"])), limit=draw(st.integers(1, 3)),
        tolerate=draw(st.sampled_from([0, 1, 2, 0.5])), results=draw(st.booleans()),
    )  # fmt: skip
    return byrd.saga(made, sig("z")) if draw(st.integers(0, 3)) == 0 else chain(made, sig("after"))


@st.composite
def _family(draw: Any) -> Any:
    first, second = (draw(st.sampled_from(sorted(WITHIN))) for _ in range(2))
    return draw(
        st.sampled_from(
            [
                chain(sig("saga8"), inner(first), sig("end")),
                chain(inner(first), inner(second), sig("saga9")),
                group(inner(first), inner(second)),
                chain(byrd.saga(inner(first), sig("w")), sig("v")),
                inner("deep"),
            ]
        )
    )


@st.composite
def _sleeper(draw: Any) -> Any:
    told = draw(
        st.sampled_from(
            [
                [nap("a", LONG), wait("ok", "ok", timeout=None), nap("b", 0)],
                [wait("ok", "1", timeout=LONG), wait("ok", "2", timeout=LONG)],
                [wait("no", "no", timeout=0, default="late"), nap("a", 0), wait("ok", "ok", timeout=None)],
                [wait("ok", "ok", timeout=LONG)],
            ]
        )
    )
    # Another that waits for the same, as a step of its own.
    return draw(st.sampled_from([sig(NAPPER, told), group(sig(NAPPER, told), byrd.wait_for("ok"))]))


CANVASES: st.SearchStrategy[tuple[str, Any]] = st.one_of(
    st.tuples(st.just("each"), _each()),
    st.tuples(st.just("each"), _each()),
    st.tuples(st.just("family"), _family()),
    st.tuples(st.just("family"), _family()),
    st.tuples(st.just("sleeper"), _sleeper()),
    st.tuples(st.just("sleeper"), _sleeper()),
)


class PartsMachine(Traffic):
    """Parts that take more than one transaction, in a few runs."""

    often = (
        *["advance"] * 4,
        *["work"] * 3,
        *["meet"] * 9,
        *["go_on"] * 2,
        *["finish"] * 2,
        *["overtake"] * 2,
        "record_items",
        "roll_on",
    )

    def __init__(self) -> None:
        super().__init__()
        query(self.monitor, "DELETE FROM test_writes")
        query(self.monitor, "TRUNCATE test_schedule")
        query(self.monitor, "INSERT INTO test_schedule VALUES (0)")
        #: What they are, by their ids; some of them may not have been committed.
        self.runs: dict[str, str] = {}
        self.known: dict[tuple[str, int], Known] = {}
        #: The run that each attempt at a workflow begins, if it has to.
        self.new_runs: dict[tuple[str, int], plans.NewRun] = {}
        self.unstuck: list[Unstuck] = []
        #: Items that have succeeded.
        self.recorded: set[str] = set()
        #: Steps that must not start: they sleep, or wait for a signal of that name that has not come.
        self.asleep: dict[str, str] = {}
        self.signals = 0
        #: How runs have ended so far, and how often each has changed.
        self.ends: dict[str, set[str]] = {}
        self.moved: Counter[str] = Counter()
        #: By the ids of jobs: the runs that each is about, and how often these had changed by then.
        self.jobs: dict[str, dict[str, int]] = {}
        #: The runs of due times.
        self.fired: dict[str, str] = {}
        self.written: list[Any] = []

    # -- what is known of what was committed -------------------------------------------------------

    def changes(self) -> list[Change]:
        # What is not due yet becomes so when somebody lets time pass: however long this takes, it is the same.
        query(self.monitor, _PUT_OFF)
        found = super().changes()
        self.written = list(query(self.monitor, "WITH gone AS (DELETE FROM test_writes RETURNING *) TABLE gone"))
        return found

    def note(self, op: Op, change: Change) -> None:
        if change.step_id is None:
            self.moved[change.run_id] += 1
            if change.new in parts.ENDED:
                self.ends.setdefault(change.run_id, set()).add(change.new)
            return
        if change.kind == "item" and change.new == "succeeded":
            assert change.step_id not in self.recorded, f"{change}: it was recorded before"
            self.recorded.add(change.step_id)
        if change.new == "running":
            assert change.step_id not in self.asleep, (
                f"{change}: it waits for {self.asleep[change.step_id] or 'a time'}"
            )
        if change.new in ("cancelled", "failed", "pending"):
            self.asleep.pop(change.step_id, None)

    def refused(self, op: Op, error: BaseException | None) -> None:
        if op.part and isinstance(error, StaleAttempt):
            self.seen[f"stale {kind_of(op.part)}"] += 1

    def ended(self, claim: Claim, how: str) -> Any:
        before = super().ended(claim, how)

        def committed(result: Any, changes: list[Change]) -> None:
            before(result, changes)
            assert self.owns(claim) or how == "revoke" or not self.written, f"a stale {how} wrote {self.written}"

        return committed

    def saw(self, op: Op, what: str) -> None:
        self.seen[what] += 1
        if self.commits > op.since:
            self.seen[f"amid others {kind_of(what)}"] += 1

    def check_tables(self) -> None:
        super().check_tables()
        for rule, sql in RULES.items():
            rows = query(self.monitor, sql).all()
            assert not rows, f"{rule}: {rows}"

    def value_of(self, claim: Claim) -> Any:
        return f"v-{json.loads(claim.args)[0]}" if claim.kind == "item" else claim.task

    def just_returns(self, claim: Claim) -> bool:
        return claim.task not in TASKS and super().just_returns(claim)

    def kin(self, run_id: str) -> list[str]:
        rows = query(
            self.monitor,
            """WITH RECURSIVE kin AS (
                 SELECT %(run)s::uuid AS id
                 UNION
                 SELECT CASE WHEN c.id = k.id THEN s.run_id ELSE c.id END FROM kin k
                   JOIN byrd.runs c ON c.parent_step IS NOT NULL JOIN byrd.steps s ON s.id = c.parent_step
                  WHERE c.id = k.id OR s.run_id = k.id)
               SELECT id::text FROM kin ORDER BY id""",
            {"run": run_id},
        )
        return list(rows.scalars())

    # -- what people do --------------------------------------------------------------------------

    @initialize(data=st.data(), first=CANVASES, second=CANVASES)
    def begin(self, data: st.DataObject, first: tuple[str, Any], second: tuple[str, Any]) -> None:
        self.favourites = data.draw(st.lists(st.sampled_from(sorted(self.moves)), max_size=4))
        for made in (first, second):
            self.submit_one(made, whole=True)

    @move(lambda self: len(self.open_runs) < 5, made=CANVASES, whole=WHOLE)
    def submit(self, made: tuple[str, Any], whole: bool) -> None:
        self.submit_one(made, whole=whole)

    def submit_one(self, made: tuple[str, Any], *, whole: bool) -> None:
        run_id, plan = self.new_id(made[0]), plan_of(made[1], shared=True)
        self.start(Op("submit", lambda conn: submit(conn, run_id, plan)), whole=whole)

    def new_id(self, what: str) -> str:
        run_id = parts.new_id(len(self.runs) + 1)
        self.runs[run_id] = what
        return run_id

    @move(
        lambda self: self.submitted("job") < 3,
        action=st.sampled_from(sorted(ACTIONS)),
        limit=st.integers(1, 3),
        whole=WHOLE,
    )
    def submit_job(self, action: str, limit: int, whole: bool) -> None:
        run_id = self.new_id("job")
        new = parts.new_run(run_id, parts.job(action, limit), bulk.BULK)

        def committed(_result: Any, _changes: list[Change]) -> None:
            found = query(
                self.monitor,
                """SELECT r.id::text FROM byrd.runs r, byrd.runs j WHERE j.id = %(job)s AND r.status = ANY(%(statuses)s)
                      AND r.workflow IS DISTINCT FROM j.workflow AND r.created_at < j.created_at""",
                {"job": run_id, "statuses": list(ACTIONS[action][1])},
            )
            self.jobs[run_id] = {row.id: self.moved[row.id] for row in found}

        self.start(Op("submit", lambda conn: plans.write(conn, [new]), committed), whole=whole)

    def submitted(self, kind: str) -> int:
        return sum(what == kind for what in self.runs.values())

    @move(whole=WHOLE)
    def undo_family(self, data: st.DataObject, whole: bool) -> None:
        """Have a run undone that has something to undo in a workflow within it."""
        row = self.pick(data, FAMILIES)
        if row is not None:
            name = "compensate" if row.status == "running" else "roll_back"
            self.command_one(data, row.id, whole=whole, names=[name])

    @move(sql=st.booleans(), early=st.integers(0, 3), whole=WHOLE)
    def signal(self, data: st.DataObject, sql: bool, early: int, whole: bool) -> None:
        row = self.pick(data, AWAITED) if early else None
        run_id = row.id if row is not None else data.draw(st.sampled_from(self.open_runs))
        self.signal_one(run_id, row.signal if row is not None else "ok", whole=whole)

    def signal_one(self, run_id: str, name: str, *, whole: bool) -> None:
        self.signals += 1
        payload = json.dumps(f"p{self.signals}")

        def committed(_result: Any, _changes: list[Change]) -> None:
            of = "SELECT id FROM byrd.steps WHERE run_id = %(run)s AND signal = %(name)s"
            for step_id in query(self.monitor, of, {"run": run_id, "name": name}).scalars():
                if self.asleep.get(step_id) == name:
                    del self.asleep[step_id]

        self.start(Op("signal", lambda conn: waits.signal(conn, run_id, name, payload), committed), whole=whole)

    @move()
    def let_time_pass(self, data: st.DataObject) -> None:
        row = self.pick(data, ASLEEP)
        if row is None:
            return
        self.quietly(
            """UPDATE byrd.steps SET run_at = now(), wake_at = least(wake_at, now()) WHERE id IN
                 (SELECT id FROM byrd.steps WHERE id = %(id)s AND status = 'ready' AND wake_at < 'infinity'
                    FOR UPDATE SKIP LOCKED)""",
            id=row.id,
        )
        aged = "UPDATE byrd.checkpoints SET updated_at = updated_at - interval '1 year' WHERE step_id = %(id)s"
        self.quietly(f"{aged} AND name LIKE 'wait:%%'", id=row.id)
        self.asleep.pop(row.id, None)

    # -- schedules -------------------------------------------------------------------------------

    @move(lambda self: self.submitted("fired") < 6, whole=WHOLE)
    def fire(self, whole: bool) -> None:
        self.fire_one(whole=whole)

    def fire_one(self, *, whole: bool) -> None:
        """Submit the run of the next due time, and note that it was; in between, beat may be killed."""
        new = parts.new_run(self.new_id("fired"), sig("nightly"), "nightly")

        def act(conn: Connection) -> tuple[str, str] | None:
            row = query(conn, "SELECT fired FROM test_schedule FOR UPDATE SKIP LOCKED").first()
            if row is None:
                return None
            key = f"schedule:1:{row.fired + 1}"
            with apart():
                [run_id], _ = self.store.run(plans.write, [replace(new, key=key)])
            query(conn, "UPDATE test_schedule SET fired = fired + 1")
            return key, run_id

        op = Op("fire", act)

        def committed(result: tuple[str, str] | None, _changes: list[Change]) -> None:
            self.saw(op, "fire" if result else "fire.busy")
            if result is not None:
                key, run_id = result
                assert key not in self.fired, f"{key} was fired before"
                self.fired[key] = run_id
                self.seen["fire.again"] += run_id != new.id

        op.committed = committed
        self.start(op, whole=whole)

    @move(
        lambda self: self.submitted("fired") < 8,
        key=st.sampled_from(["k1", "k2", "k3", ""]),
        plain=st.booleans(),
        turns=st.lists(st.booleans(), max_size=8),
        commits=st.tuples(st.booleans(), st.booleans()),
    )
    def fire_together(self, key: str, plain: bool, turns: list[bool], commits: tuple[bool, bool]) -> None:
        """Two beats submit the run of one due time; unless they meet at the row, neither knows of the other."""
        self.make_room(2)
        pair = self.idle()[:2]
        for _ in pair:
            canvas = sig("nightly") if plain else byrd.saga(sig("nightly"), byrd.wait_for("ok"))
            if not key:
                self.fire_one(whole=False)
                continue
            self.submit_keyed(parts.new_run(self.new_id("fired"), canvas, "hourly", key=key))
        self.take_turns(pair, turns, commits)

    def submit_keyed(self, new: plans.NewRun) -> None:
        def committed(result: tuple[list[str], Any], _changes: list[Change]) -> None:
            [run_id], _ = result
            key = f"hourly {new.key}"
            assert self.fired.setdefault(key, run_id) == run_id, f"two runs of {key}"
            self.saw(op, "keyed" if run_id == new.id else "keyed.again")

        op = Op("submit", lambda conn: plans.write(conn, [new]), committed)
        self.start(op, whole=False)

    # -- what workers do -------------------------------------------------------------------------

    def end_one(self, claim: Claim, how: str, *, whole: bool) -> None:
        if how == "complete" and claim.task in TASKS:
            self.go_on_with(claim, whole=whole)
        elif how == "put_back" and claim.task in TASKS:  # it may have begun
            super().end_one(claim, "hand_back", whole=whole)
        else:
            super().end_one(claim, how, whole=whole)

    def go_on_with(self, claim: Claim, *, whole: bool, lost: bool = False) -> None:
        """Have an attempt do what its part does next; the answer may get ``lost``, and then it does it again."""
        key = claim.id, claim.attempt
        part = self.part_of(claim, self.known.get(key, Known()))
        done = self.ended(claim, part.name)

        def committed(result: Any, changes: list[Change]) -> None:
            done(result, changes)
            if not self.owns(claim):
                return
            self.saw(op, part.what)
            part.then(result)
            self.learn(claim, part, result, changes)
            if not lost and part.name not in LAST:
                self.known[key] = Known(part.what, part.tag, result)

        op = Op(part.name, part.function, committed, part.what)
        self.start(op, whole=whole)

    def part_of(self, claim: Claim, known: Known) -> Part:
        if claim.task != SUBWORKFLOW:
            return PARTS[claim.task](self.monitor, claim, known)
        key = claim.id, claim.attempt
        if key not in self.new_runs:
            name = json.loads(claim.kwargs)[WORKFLOW_NAME]
            self.new_runs[key] = parts.new_run(self.new_id("within"), WITHIN[name](), name, of=claim.id)
        return parts.inner_part(self.monitor, claim, known, self.new_runs[key])

    def learn(self, claim: Claim, part: Part, result: Any, changes: list[Change]) -> None:
        """Check, and note, what an owner's step of a part has come to."""
        match part.what:
            case "nap" if part.tag == "long":
                self.asleep[claim.id] = ""
            case "give_way" if part.tag:
                kept = (
                    """SELECT 1 FROM byrd.signals WHERE run_id = %(run)s AND name = %(name)s AND delivered_at IS NULL"""
                )
                if query(self.monitor, kept, {"run": claim.run_id, "name": part.tag}).first() is None:
                    self.asleep[claim.id] = part.tag
            case "inner.complete":
                assert "succeeded" in self.ends.get(part.tag, ())
            case "inner.failed" | "inner.cancelled":
                assert self.ends.get(part.tag, set()) & {"failed", "cancelled"}
            case "inner.try_again" if changes:
                self.seen["inner.retried"] += 1
            case "bulk" if result[0].refused:
                self.seen["bulk.refused"] += 1
            case "bulk.complete" if claim.run_id in self.jobs:
                self.check_job(claim.run_id, self.known[claim.id, claim.attempt].result[0])
        if part.name == "hand_back":
            row = query(
                self.monitor, "SELECT worker_id, claim FROM byrd.steps WHERE id = %(id)s", {"id": claim.id}
            ).one()
            assert row == (None, None), "it keeps its slot"

    def check_job(self, run_id: str, so_far: bulk.Progress) -> None:
        """What has matched since a job was submitted, and is as it was, has refused."""
        by = "SELECT run_id::text FROM byrd.events WHERE detail::json ->> 'by' = %(by)s"
        acted_on = set(query(self.monitor, by, {"by": f"bulk {run_id}"}).scalars())
        left = [one for one, moved in self.jobs[run_id].items() if self.moved[one] == moved and one not in acted_on]
        assert len(left) <= so_far.refused, f"{left} were passed over: {so_far}"

    @move(
        which=st.sampled_from([*sorted(WHICH), "any", "parts", "parts", "within"]),
        worker=st.integers(0, 1),
        before=st.integers(0, 5),
        begun=st.integers(0, 4),
        how=st.sampled_from(HOW),
        whole=WHOLE,
    )
    def work(
        self, data: st.DataObject, which: str, worker: int, before: int, begun: int, how: str, whole: bool
    ) -> None:
        """Claim steps, and bring them to where they give way, or end; end the last one in any way."""
        for left in range(before, -1, -1):
            row, known = self.pick(data, self.ready(which)), len(self.claims)
            if row is None:
                return
            self.claim_one(row, worker, row.attempt, whole=True)
            if len(self.claims) == known:
                return
            claim = self.claims[-1]
            if left:
                self.run_through(claim)
                continue
            if claim.task in TASKS:
                self.run_through(claim, most=begun)
            if how != "leave":
                self.end_one(claim, how, whole=whole)

    @move(most=st.integers(1, 8), begun=st.sampled_from([20, 20, 1, 2]), stop=st.integers(0, 7))
    def advance(self, data: st.DataObject, most: int, begun: int, stop: int) -> None:
        """Bring a run on, with those within it and around it.

        Now and then one within another is cancelled by itself first, or one is tried again that has failed with it.
        """
        kin = self.kin(data.draw(st.sampled_from(self.open_runs)))
        within, failed = self.pick(data, WITHIN_OTHERS), self.pick(data, FAILED_WITH_OTHERS)
        if stop == 0 and within is not None:
            self.command_one(data, within.id, whole=True, names=["cancel", "compensate", "terminate"])
        if stop < 3 and failed is not None:
            self.command_one(data, failed.id, whole=True, names=["retry_run"])
            kin = self.kin(failed.id)
        for _ in range(most):
            rows = [row for row in query(self.monitor, self.ready("any")) if row.run_id in kin]
            if not rows or not self.free():
                return
            row, known = data.draw(st.sampled_from(rows)), len(self.claims)
            self.claim_one(row, 0, row.attempt, whole=True)
            for claim in self.claims[known:]:
                self.run_through(claim, most=begun)
            self.follow()

    @move(
        kinds=st.tuples(st.sampled_from(ACTS), st.sampled_from(ACTS)),
        begun=st.integers(0, 4),
        turns=st.lists(st.booleans(), max_size=16),
        commits=st.tuples(*[st.sampled_from([True, True, True, False])] * 2),
    )
    def meet(
        self, data: st.DataObject, kinds: tuple[str, str], begun: int, turns: list[bool], commits: tuple[bool, bool]
    ) -> None:
        """Have an attempt at a part, and somebody who has to do with it, act side by side."""
        claim = self.some_part(data, begun)
        if claim is None:
            return
        self.make_room(2)
        kin = self.kin(claim.run_id) if claim.task != bulk.BULK else sorted(self.open_runs)
        pair = self.idle()[:2]
        for kind in kinds:
            self.act(data, kind, claim, kin)
        self.take_turns(pair, turns, commits)

    def some_part(self, data: st.DataObject, begun: int) -> Claim | None:
        """Draw an attempt at a part that owns its step, or claim one, and let it begin."""
        owned = [claim for claim in self.parts() if self.owns(claim)]
        row = self.pick(data, self.ready("parts")) if len(owned) < 2 else None
        if row is not None:
            known = len(self.claims)
            self.claim_one(row, 1, row.attempt, whole=True)
            for claim in self.claims[known:]:
                self.run_through(claim, most=begun)
                owned += [claim] if self.owns(claim) else []
        return data.draw(st.sampled_from(owned)) if owned else None

    def act(self, data: st.DataObject, kind: str, claim: Claim, kin: list[str]) -> None:
        """Begin to do something with a part, statement by statement."""
        rows = [row for row in query(self.monitor, READY) if row.run_id in kin]
        running = [c for c in self.claims if c.run_id in kin and c.id != claim.id and self.owns(c)]
        match kind:
            case "step" if running:
                how = data.draw(st.sampled_from(["complete", "complete", "fail", "hand_back"]))
                self.end_one(data.draw(st.sampled_from(running)), how, whole=False)
            case "claim" if rows:
                row = data.draw(st.sampled_from(rows))
                self.claim_one(row, 0, row.attempt, whole=False)
            case "drop" if rows:
                row = data.draw(st.sampled_from(rows))
                self.start(Op("revoke", lambda conn: steps.revoke_waiting(conn, row.id)), whole=False)
            case "command":
                self.command_one(data, data.draw(st.sampled_from(kin)), whole=False)
            case "signal":
                self.signal_one(claim.run_id, "ok", whole=False)
            case "tell":
                self.tell_parents(whole=False)
            case "end":
                how = data.draw(st.sampled_from(ENDS[4:]))
                self.end_one(claim, how, whole=False)
            case _:
                self.go_on_with(claim, whole=False)

    def ready(self, which: str) -> str:
        return READY.replace("WHERE", f"WHERE ({WHICH[which]}) AND {DUE} AND")

    def run_through(self, claim: Claim, *, most: int = 20) -> None:
        """Run a step until it gives way, or has ended, or has to wait for somebody."""
        for _ in range(most):
            before = self.commits
            if self.owns(claim):
                self.end_one(claim, "complete", whole=True)
            if self.commits == before:
                return

    @move(lambda self: self.parts(), lost=st.integers(0, 4), most=st.integers(1, 3), whole=WHOLE)
    def go_on_with_part(self, data: st.DataObject, lost: int, most: int, whole: bool) -> None:
        """Do the next thing, or things, of an attempt at a part, which may not own its step any more."""
        claim = self.draw_claim(data, self.parts())
        for left in range(most - 1, -1, -1):
            self.go_on_with(claim, whole=whole or left > 0, lost=lost == 0)

    @move(lambda self: any(self.owns(claim) for claim in self.parts()), whole=WHOLE)
    def overtake(self, data: st.DataObject, whole: bool) -> None:
        """Have a step of a part claimed by another attempt, of which the one before does not know."""
        claim = data.draw(st.sampled_from([claim for claim in self.parts() if self.owns(claim)]))
        self.end_one(claim, "hand_back", whole=True)
        row = query(self.monitor, f"SELECT * FROM ({READY}) ready WHERE id = %(id)s", {"id": claim.id}).first()
        if row is not None:
            self.claim_one(row, 1, row.attempt, whole=True)
        self.go_on_with(claim, whole=whole)

    def parts(self) -> list[Claim]:
        return [claim for claim in self.claims if claim.task in TASKS]

    @move(fail=st.integers(0, 3), whole=WHOLE)
    def record_items(self, data: st.DataObject, fail: int, whole: bool) -> None:
        """Take what items are ready, and record several of an each together, or let them fail."""
        for row in query(self.monitor, self.ready("items")).all():
            self.claim_one(row, 0, row.attempt, whole=True)
        all_items = [claim for claim in self.claims if claim.kind == "item"]
        if not all_items:
            return
        for claim in [claim for claim in all_items if self.owns(claim)] if fail == 0 else []:
            self.end_one(claim, "fail", whole=True)
        one = self.draw_claim(data, all_items)
        others = [c for c in all_items if (c.run_id, c.join_no) == (one.run_id, one.join_no)]
        stale = data.draw(st.lists(st.sampled_from(others), max_size=2))
        drawn = {c.id: c for c in [*stale, *(c for c in others if self.owns(c)), one]}
        given = {c.id: (c.attempt, json.dumps(self.value_of(c))) for c in drawn.values()}

        def committed(result: tuple[set[str], Any], changes: list[Change]) -> None:
            ended = {c.step_id for c in changes if c.kind == "item" and c.old == "running"}
            assert ended == {c.id for c in drawn.values() if self.owns(c)}
            assert ended <= result[0]
            if len(ended) > 1:
                self.saw(op, "record_items")

        op = Op("complete", lambda conn: items.complete(conn, one.run_id, one.join_no or 0, given), committed)
        self.start(op, whole=whole)

    # -- what the workers' threads do --------------------------------------------------------------

    @move(whole=WHOLE)
    def tell_parents(self, whole: bool) -> None:
        def committed(result: tuple[int, list[Unstuck]], changes: list[Change]) -> None:
            assert not changes, f"whoever tells of an end moves nothing: {changes}"
            told, unstuck = result
            self.unstuck += unstuck
            if told:
                self.saw(op, "tell_parents")

        op = Op("tell_parents", children.tell_parents, committed)
        self.start(op, whole=whole)

    @move(lambda self: self.unstuck, again=st.booleans(), whole=WHOLE)
    def go_on_undoing(self, again: bool, whole: bool) -> None:
        """Have a rollback go on that was stuck because of one within; now and then twice."""
        one = self.unstuck[0] if again else self.unstuck.pop(0)

        def committed(_result: Any, changes: list[Change]) -> None:
            if changes:
                self.saw(op, "go_on_undoing")

        op = Op("retry_run", lambda conn: children.go_on(conn, one), committed)
        self.start(op, whole=whole)

    @move(lambda self: children.abandoned(self.monitor), whole=WHOLE)
    def stop_abandoned(self, data: st.DataObject, whole: bool) -> None:
        self.stop_one(data.draw(st.sampled_from(sorted(children.abandoned(self.monitor)))), whole=whole)

    def stop_one(self, one: tuple[str, str], *, whole: bool) -> None:
        def committed(_result: Any, _changes: list[Change]) -> None:
            self.saw(op, "stop_abandoned")

        child, outer = one
        op = Op("cancel", lambda conn: runs.cancel(conn, child, by=f"run {outer}"), committed)
        self.start(op, whole=whole)

    @move()
    def follow(self) -> None:
        """Do all of this at once."""
        self.tell_parents(whole=True)
        while self.unstuck and self.free():
            self.go_on_undoing(again=False, whole=True)
        for one in sorted(children.abandoned(self.monitor)):
            self.stop_one(one, whole=True)

    @move(
        hows=st.lists(st.sampled_from(["complete", "complete", "fail"]), min_size=1, max_size=5),
        whole=WHOLE,
    )
    def roll_on(self, data: st.DataObject, hows: list[str], whole: bool) -> None:
        """Bring rollbacks on that have others within, and let some of what they do fail."""
        for left, how in reversed(list(enumerate(hows))):
            row, stuck, known = self.pick(data, self.ready("undoing")), self.pick(data, STUCK), len(self.claims)
            if row is not None:
                self.claim_one(row, 0, row.attempt, whole=True)
                for claim in self.claims[known:]:
                    if claim.task in TASKS:
                        self.run_through(claim)
                    else:
                        self.end_one(claim, how, whole=whole or left > 0)
            elif stuck is not None and left % 2:
                self.command_one(data, stuck.id, whole=whole or left > 0, names=["retry_run", "skip_undo"])
            else:
                self.undo_family(data, whole=whole or left > 0)
            self.follow()

    # -- the end ---------------------------------------------------------------------------------

    def come_to_ends(self) -> None:
        self.seen = Counter()  # what is wanted is to happen between others
        self.drive()
        self.check_ends()
        self.world.check()

    def drive(self) -> None:
        """Bring all runs to their ends: nothing fails any more, and nobody is in the way."""
        self.world.sql("UPDATE byrd.workers SET lease_until = now() - interval '1 s'")
        while self.world.sql("SELECT 1 FROM byrd.steps WHERE status = 'running'"):
            self.start(Op("recover", lambda conn: sweeps.recover(conn, max_preemptions=1000)), whole=True)
        self.workers = [self.world.add_worker()] * 2
        for _ in range(ROUNDS):
            if not query(self.monitor, OPEN).first():
                return
            self.go_round()
        rows = self.world.sql(
            """SELECT r.id::text, r.status AS run, s.no, s.kind, s.task, s.status, s.attempt, s.run_at, s.wake_at
                 FROM byrd.runs r JOIN byrd.steps s ON s.run_id = r.id WHERE r.finished_at IS NULL ORDER BY 1, 3"""
        )
        raise AssertionError("\n".join(map(str, rows)))

    def go_round(self) -> None:
        self.world.sql("UPDATE byrd.steps SET expires_at = NULL WHERE finished_at IS NULL RETURNING 1")
        self.world.sql(
            "UPDATE byrd.steps SET fallback = to_json(signal) WHERE kind = 'wait' AND finished_at IS NULL RETURNING 1"
        )
        self.world.sql(
            """UPDATE byrd.steps SET run_at = now() WHERE status = 'ready' AND run_at > now() AND run_at < 'infinity'
               RETURNING 1"""
        )
        self.asleep = {step_id: signal for step_id, signal in self.asleep.items() if signal}
        for run_id, status in self.world.sql("SELECT id::text, status FROM byrd.runs"):
            command = {"paused": runs.resume, "rollback_stuck": runs.retry}.get(status)
            if command is not None:
                name = "resume" if status == "paused" else "retry_run"
                self.start(Op(name, lambda conn, do=command, run_id=run_id: do(conn, run_id)), whole=True)  # type: ignore[misc]
        for row in self.world.sql(f"SELECT * FROM ({AWAITED}) awaited"):
            self.signal_one(row.id, row.signal, whole=True)
        self.start(Op("end_waits", waits.end_due), whole=True)
        self.follow()
        for row in query(self.monitor, self.ready("any")).all():
            known = len(self.claims)
            self.claim_one(row, 0, row.attempt, whole=True)
            for claim in self.claims[known:]:
                self.finish_claim(claim)
            if len(self.claims) == known:
                self.start(Op("stop_pivot", lambda conn, row=row: sagas.stop_pivot(conn, row.id)), whole=True)  # type: ignore[misc]

    def finish_claim(self, claim: Claim) -> None:
        """Run a step as a worker does, which looks now and then whether it is to stop."""
        for _ in range(50):
            if not self.owns(claim):
                return
            reason: ControlFlow | None = progress.stop_reason(self.monitor, claim.id, claim.attempt)
            name = "abandon" if isinstance(reason, StepCancelled) else "hand_back"
            if reason is None:
                self.end_one(claim, "complete", whole=True)
            else:
                end = getattr(steps, name)
                self.start(Op(name, lambda conn, end=end: end(conn, claim.id, claim.attempt)), whole=True)  # type: ignore[misc]
        raise AssertionError(f"{claim} does not come to an end")

    def check_ends(self) -> None:
        """What the runs have come to is what was asked for, inside and outside."""
        unasked = """SELECT id FROM byrd.runs r WHERE status = 'cancelled' AND NOT EXISTS (SELECT 1 FROM byrd.events e
                      WHERE e.run_id = r.id AND e.event IN ('cancel_requested','rollback_requested'))"""
        assert not self.world.sql(unasked)
        lost = """SELECT s.id FROM byrd.steps s JOIN byrd.runs c ON c.parent_step = s.id
                   WHERE s.status = 'succeeded' AND s.task = 'byrd.workflow' AND s.result IS NULL"""
        assert not self.world.sql(lost)
        for row in self.world.sql(_UNDONE):
            left = self.world.do(undo.compensable, row.id)
            assert not left, f"run {row.id} is a part of {row.outer}, which was rolled back, and is not undone"
        fired = dict(self.world.sql("SELECT key, id::text FROM byrd.runs WHERE workflow = 'nightly'"))
        assert self.fired.items() & fired.items() == {(k, v) for k, v in self.fired.items() if k.startswith("schedule")}
        [row] = self.world.sql("SELECT fired FROM test_schedule")
        assert len(fired) - row.fired in (0, 1), "one due time, at most, has a run and is not noted"


#: Runs within others that were rolled back, which nobody has had a hand in but those.
_UNDONE = """
SELECT c.id::text, o.id::text AS outer FROM byrd.runs o JOIN byrd.steps s ON s.run_id = o.id
  JOIN byrd.runs c ON c.parent_step = s.id AND c.pivot IS NULL
 WHERE o.pivot IS NULL
   AND EXISTS (SELECT 1 FROM byrd.steps u WHERE u.run_id = o.id AND u.kind = 'compensation' AND u.saga IS NULL)
   AND NOT EXISTS (SELECT 1 FROM byrd.events e WHERE e.run_id IN (o.id, c.id)
          AND e.event IN ('compensation_skipped','done_by_hand'))
   AND NOT EXISTS (SELECT 1 FROM byrd.events e WHERE e.run_id = c.id
          AND e.event IN ('cancel_requested','rollback_requested','retried')
          AND coalesce(e.detail::json ->> 'by', '') NOT LIKE 'run %%')
"""


def kind_of(what: str) -> str:
    """Return the kind of part that something is done for."""
    kind = what.partition(".")[0]
    return "waits" if kind in ("nap", "take", "give_way", "settle", "wait") else kind


#: What an attempt does that owns its step: each of these must have been committed.
DONE = {
    "each.look", "each.insert", "each.reopen", "each.park", "each.finish", "each.fail", "record_items",
    "inner.begin", "inner.await", "inner.complete", "inner.failed", "inner.cancelled", "inner.retried",
    "undo", "undo.await", "undo.complete", "undo.fail", "tell_parents", "go_on_undoing", "stop_abandoned",
    "bulk", "bulk.refused", "bulk.complete", "fire", "fire.busy", "fire.again", "keyed", "keyed.again",
    "nap", "take", "give_way", "settle", "wait.fail", "nap.complete",
}  # fmt: skip
#: And of these, some while others committed between their statements; some of attempts that had lost their steps.
WANTED = DONE | {f"amid others {kind}" for kind in ("each", "inner", "undo", "bulk", "waits", "fire")}
WANTED |= {f"stale {kind}" for kind in ("each", "inner", "undo", "bulk", "waits")}


@pytest.mark.timeout(3600 if EXAMPLES > 100 else 1500)
def test_parts_of_many_transactions_in_any_interleaving_of_three_sessions(noted_store: Store) -> None:
    noted_store.run(query, WRITES)
    explore(PartsMachine, noted_store, WANTED, fewest=2 if EXAMPLES < 100 else 1)
