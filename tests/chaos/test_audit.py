"""The audit of `byrd chaos` finds what is wrong: here it is put there by hand, after runs that went well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from random import Random
from threading import Event
from typing import Any
from uuid import uuid4

import pytest

from byrd.chaos import faults as the
from byrd.chaos import ledger, tasks
from byrd.chaos.audit import audit
from byrd.chaos.facts import broken
from byrd.chaos.faults import Fault, Field, Kind, Victim
from byrd.chaos.report import Audit, Finding, Report
from byrd.chaos.submitter import Submission
from byrd.chaos.targets import EmbeddedServer
from byrd.store import Store
from byrd.store.invariants import Broken
from tests.cluster import Cluster, wait_until

APP = "tests.apps.basic"


@dataclass(frozen=True)
class World:
    """A cluster with a worker that knows the load."""

    cluster: Cluster
    engine: Any
    shapes: dict[str, tasks.Shape]
    store: Store
    #: What other tests have broken.
    known: frozenset[Broken] = frozenset()

    def submit(self, name: str, number: int = 7) -> Submission:
        run = self.engine.submit(self.shapes[name].build(number))
        return Submission(f"key-{run.id}", self.shapes[name], number, datetime.now(UTC), run.id)

    def finished(self, name: str) -> Submission:
        submission = self.submit(name)
        self.engine.get(submission.run_id).wait(timeout=60)
        return submission

    def audit(self, *submissions: Submission, faults: tuple[Fault, ...] = (), alone: bool = False) -> Audit:
        def why(run_id: str) -> list[str]:
            found: list[str] = self.engine.get(run_id).why()
            return found

        return audit(self.store, submissions, faults, why=why, alone=alone, known=self.known)

    def step(self, submission: Submission, task: str) -> str:
        [(step,)] = self.cluster.rows(
            "SELECT id FROM byrd.steps WHERE run_id = %s AND task = %s ORDER BY no LIMIT 1",
            submission.run_id,
            tasks.PREFIX + task,
        )
        return str(step)

    def leave_effect(self, submission: Submission, step: str, attempt: int, **where: Any) -> None:
        self.store.run(ledger.record_effect, ledger.new_effect(), str(submission.run_id), step, attempt, **where)

    def give_back(self, outcome: str, *, place: Victim | None = None) -> tuple[Submission, str]:
        """Have a run whose first step's first attempt ended so 5 to 3 seconds ago, and was followed by a second."""
        submission = self.finished("chain")
        step = self.step(submission, "touch")
        self.cluster.rows("DELETE FROM byrd_chaos.effects WHERE step_id = %s", step)
        where = {"worker_id": place.worker_id, "pid": place.pid} if place else {}
        self.leave_effect(submission, step, 1, **where)
        self.leave_effect(submission, step, 2)
        self.cluster.rows(
            """UPDATE byrd.steps SET attempt = 2, result = jsonb_set(result::jsonb, '{attempt}', '2')::text
                WHERE id = %s""",
            step,
        )
        self.cluster.rows("DELETE FROM byrd_chaos.completions WHERE step_id = %s", step)
        self.cluster.rows(
            """INSERT INTO byrd.attempts (step_id, attempt, outcome, worker, started_at, ended_at)
               VALUES (%s, 1, %s, 'w@there', clock_timestamp() - interval '5 s', clock_timestamp() - interval '3 s')""",
            step, outcome,
        )  # fmt: skip
        return submission, step


@pytest.fixture(scope="module")
def module_world(module_cluster: Cluster) -> Iterator[World]:
    module = module_cluster.app(APP)
    tasks.register(module.app)
    store = Store(module_cluster.database_url)
    store.run(ledger.create, watch=True)
    module_cluster.worker(APP, queues=[tasks.QUEUE], options=["-I", "byrd.chaos.load"])
    yield World(module_cluster, module.engine, {shape.name: shape for shape in tasks.shapes(module.app)}, store)
    store.close()


@pytest.fixture
def world(module_world: World) -> World:
    return replace(module_world, known=frozenset(module_world.store.run(broken)))


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def report_of(found: Audit) -> Report:
    return Report(0, datetime.now(UTC), 1.0, 1.0, (), (), {}, found)


def test_runs_that_went_well(world: World) -> None:
    submissions = [world.finished(name) for name in world.shapes]
    found = world.audit(*submissions)
    assert report_of(found).failures == []
    assert (found.submitted, found.finished) == (len(world.shapes), len(world.shapes))
    assert found.statuses == {"succeeded": len(world.shapes) - 1, "failed": 1}
    assert found.repeated == {"retried": 2}
    assert found.effects == found.completions + 3  # two tries that asked for another, and the step that fails


def test_a_run_that_vanished_is_lost(world: World) -> None:
    submission = world.finished("chain")
    world.cluster.rows("DELETE FROM byrd.runs WHERE id = %s", submission.run_id)
    found = world.audit(submission)
    assert found.lost == [
        Finding(str(submission.run_id), None, f"submit(key={submission.key}) returned it; it is not in the table")
    ]
    assert "1 lost" in report_of(found).failures


def test_a_run_that_does_not_end_is_stuck_with_its_reason(world: World) -> None:
    run = world.engine.submit(world.engine.app.tasks["byrd.chaos.touch"].s(1).set(queue="nobody"))
    submission = Submission("key", world.shapes["chain"], 1, datetime.now(UTC), run.id)
    [stuck] = world.audit(submission).stuck
    assert stuck.run == run.id
    assert "'nobody'" in stuck.what or "nobody" in stuck.what
    assert "1 stuck" in report_of(world.audit(submission)).failures
    run.cancel()


def test_a_submit_that_raised_is_looked_up_by_its_key(world: World) -> None:
    shape = world.shapes["chain"]
    if shape.workflow not in world.engine.workflows:
        world.engine.workflow(shape.workflow)(shape.build)
    run = world.engine.submit(shape.workflow, 3, key="asked")
    run.wait(timeout=60)
    now = datetime.now(UTC)
    found = world.audit(Submission("asked", shape, 3, now, None), Submission("never written", shape, 4, now, None))
    assert (found.submitted, found.unsure, found.finished) == (1, 1, 1)
    assert report_of(found).failures == []


def test_a_result_that_is_wrong(world: World) -> None:
    submission = world.finished("chord")
    result = '{"value": 12, "attempt": 1}'
    world.cluster.rows("UPDATE byrd.steps SET result = %s WHERE id = %s", result, world.step(submission, "gather"))
    found = world.audit(submission)
    assert [one.what for one in found.wrong] == [f"chord: its result is {result}, and its value should be 50"]
    assert len(found.twice) == 1  # the trigger saw a second result, too
    assert report_of(found).failures == ["1 ended otherwise than they should", "1 recorded twice"]


def test_a_completion_without_its_effect(world: World) -> None:
    submission = world.finished("chain")
    world.cluster.rows("DELETE FROM byrd_chaos.effects WHERE step_id = %s", world.step(submission, "touch"))
    assert [one.what for one in world.audit(submission).wrong] == ["attempt 1 succeeded without its effect"]


def test_an_item_committed_twice(world: World) -> None:
    submission = world.finished("checkpoints")
    step = world.step(submission, "walk")
    world.store.run(ledger.record_items, str(submission.run_id), step, 1, [3])
    assert world.audit(submission).twice == [Finding(str(submission.run_id), step, "item 3 was committed 2 times")]


def test_an_attempt_that_ended_and_completed(world: World) -> None:
    submission = world.finished("chain")
    step = world.step(submission, "touch")
    world.cluster.rows("INSERT INTO byrd.attempts (step_id, attempt, outcome) VALUES (%s, 1, 'preempted')", step)
    [twice] = world.audit(submission).twice
    assert twice.what == "attempt 1 ended as preempted, and completed the step"


@pytest.mark.parametrize("attempt, what", [(1, "left 2 effects"), (2, "left an effect, but attempt 1 is the last")])
def test_an_effect_without_a_reason(world: World, attempt: int, what: str) -> None:
    submission = world.finished("chain")
    step = world.step(submission, "touch")
    world.leave_effect(submission, step, attempt)
    found = world.audit(submission)
    assert found.unexplained
    assert what in " ".join(one.what for one in found.unexplained)
    assert "repeated without a reason" in report_of(found).failures[-1]


# -- what a stale attempt has written --------------------------------------------------------------


def test_a_result_that_a_stale_attempt_recorded(world: World) -> None:
    submission, step = world.give_back("preempted")
    assert world.audit(submission).wrong == []
    # The fence is broken: the first attempt completes the step that the second has.
    world.cluster.rows(
        "UPDATE byrd.steps SET result = jsonb_set(result::jsonb, '{attempt}', '1')::text WHERE id = %s", step
    )
    world.cluster.rows("DELETE FROM byrd_chaos.completions WHERE step_id = %s", step)
    found = world.audit(submission)
    what = "its result was recorded by attempt 1, which was stale: attempt 2 had the step"
    assert (found.wrong, found.twice, found.broken) == ([Finding(str(submission.run_id), step, what)], [], [])
    assert report_of(found).failures == ["1 ended otherwise than they should"]


def test_a_result_that_does_not_say_whose_it_is(world: World) -> None:
    submission = world.finished("chain")
    world.cluster.rows("UPDATE byrd.steps SET result = '8' WHERE id = %s", world.step(submission, "touch"))
    [wrong] = world.audit(submission).wrong
    assert wrong.what.startswith("its result, 8, does not say which attempt gave it")


def test_an_item_that_an_attempt_committed_after_its_end(world: World) -> None:
    submission = world.finished("checkpoints")
    step = world.step(submission, "walk")
    world.cluster.rows("""UPDATE byrd_chaos.items SET attempt = 2 WHERE step_id = %s AND item > 3""", step)
    world.cluster.rows(
        """INSERT INTO byrd.attempts (step_id, attempt, outcome, ended_at)
           SELECT step_id, 1, 'preempted', max(at) FROM byrd_chaos.items WHERE step_id = %s AND item = 2 GROUP BY 1""",
        step,
    )
    wrong = [one for one in world.audit(submission).wrong if "item" in one.what]
    what = "item 3 was committed by attempt 1 after it had ended as preempted"
    assert wrong == [Finding(str(submission.run_id), step, what)]


@pytest.mark.parametrize(
    "again",
    [
        "status = 'succeeded', result = result, finished_at = clock_timestamp()",
        "status = 'succeeded', result = result, finished_at = finished_at",
        "finished_at = clock_timestamp()",
    ],
    ids=["as a completion does it", "with the very same values", "its time alone"],
)
def test_the_same_result_recorded_again(world: World, again: str) -> None:
    submission = world.finished("chain")
    step = world.step(submission, "touch")
    world.cluster.rows(f"UPDATE byrd.steps SET {again} WHERE id = %s", step)
    found = world.audit(submission)
    assert found.twice == [Finding(str(submission.run_id), step, "2 completions were recorded")]
    assert "1 recorded twice" in report_of(found).failures


# -- whose fault it was ----------------------------------------------------------------------------

THE_LIFE = Victim("w@there", str(uuid4()), 41)
ANOTHER_LIFE = Victim("w@there", str(uuid4()), 41)


@pytest.mark.parametrize(
    "outcome, fault",
    [
        ("preempted", Fault(Kind.WORKER_KILLED, "", ago(0), victim=replace(THE_LIFE, pid=None))),
        ("preempted", Fault(Kind.CHILD_KILLED, "", ago(0), victim=THE_LIFE)),
        ("preempted", Fault(Kind.WORKER_FROZEN, "", ago(0), victim=replace(THE_LIFE, pid=None), until=ago(-6))),
        ("handed_back", Fault(Kind.WORKER_STOPPED, "", ago(0), victim=replace(THE_LIFE, pid=None))),
        ("handed_back", Fault(Kind.REDIS_RESTARTED, "", ago(-1), since=ago(0))),
        ("handed_back", Fault(Kind.POSTGRES_RESTARTED, "", ago(-1), since=ago(0))),
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_an_attempt_that_a_fault_ended(world: World, outcome: str, fault: Fault) -> None:
    submission, _ = world.give_back(outcome, place=THE_LIFE)
    now = datetime.now(UTC)
    fault = replace(
        fault,
        at=now - timedelta(seconds=3.5),
        since=now - timedelta(seconds=4.5) if fault.since else None,
        until=now + timedelta(seconds=2) if fault.until else None,
    )
    found = world.audit(submission, faults=(fault,), alone=True)
    assert (found.repeated, found.unexplained, found.unprovoked) == ({fault.kind: 1}, [], [])
    assert report_of(found).failures == []


@pytest.mark.parametrize(
    "fault, at, until",
    [
        (Fault(Kind.WORKER_KILLED, "", ago(0), victim=replace(ANOTHER_LIFE, pid=None)), 3.5, None),
        (Fault(Kind.CHILD_KILLED, "", ago(0), victim=replace(THE_LIFE, pid=42)), 3.5, None),
        (Fault(Kind.CHILD_KILLED, "", ago(0), victim=THE_LIFE), 0.5, None),
        (Fault(Kind.WORKER_FROZEN, "", ago(0), victim=replace(THE_LIFE, pid=None)), 60, 50),
        (Fault(Kind.REDIS_RESTARTED, "", ago(0)), 3.5, None),
    ],
    ids=["another life of the worker", "another process", "after its end", "woken before it began", "Redis"],
)
def test_an_attempt_that_no_fault_ended(world: World, fault: Fault, at: float, until: float | None) -> None:
    submission, step = world.give_back("preempted", place=THE_LIFE)
    found = world.audit(submission, faults=(replace(fault, at=ago(at), until=ago(until) if until else None),))
    assert (found.repeated, found.unexplained) == ({"preempted": 1}, [])
    assert [one.step for one in found.unprovoked] == [step]
    assert report_of(found).failures == []  # told only: a machine may be too slow for the lease


def test_an_attempt_that_was_cut_short_before_its_effect(world: World) -> None:
    """Only its times tell which life of its worker it belonged to, unless the fault has it among its hits."""
    submission, step = world.give_back("preempted")
    victim = replace(ANOTHER_LIFE, pid=None)
    for at, hits, explained in ((3.5, (), True), (60, (), False), (1, (), False), (10, ((step, 1),), True)):
        fault = Fault(Kind.WORKER_KILLED, "", ago(at), hits, victim)
        assert bool(world.audit(submission, faults=(fault,)).unprovoked) is not explained, (at, hits)


def test_a_step_that_was_handed_back_without_a_reason(world: World) -> None:
    submission, step = world.give_back("handed_back", place=THE_LIFE)
    killed = Fault(Kind.WORKER_KILLED, "", ago(3.5), victim=replace(THE_LIFE, pid=None))  # then it hands back nothing
    said = "attempt 1: handed back, though nobody had stopped its worker or paused its run, and no server was away"
    finding = Finding(str(submission.run_id), step, said)
    found = world.audit(submission, faults=(killed,), alone=True)
    assert (found.repeated, found.unexplained, found.unprovoked) == ({}, [finding], [])
    assert report_of(found).failures == ["1 repeated without a reason"]
    # In a staging system somebody may have deployed meanwhile.
    elsewhere = world.audit(submission, faults=(killed,))
    assert (elsewhere.repeated, elsewhere.unexplained, elsewhere.unprovoked) == ({"handed_back": 1}, [], [finding])
    world.cluster.rows(
        "INSERT INTO byrd.events (run_id, event, at) VALUES (%s, 'paused', %s)", submission.run_id, ago(4)
    )
    paused = world.audit(submission, alone=True)
    assert (paused.repeated, paused.unexplained, paused.unprovoked) == ({"handed_back": 1}, [], [])


# -- the tables ------------------------------------------------------------------------------------


def test_an_invariant_that_is_broken(world: World) -> None:
    submission, stranger = world.finished("rollback"), world.finished("chain")
    assert world.audit(submission).broken == []
    world.cluster.rows("UPDATE byrd.runs SET error = NULL WHERE id = %s", submission.run_id)
    world.cluster.rows("UPDATE byrd.runs SET output = 99 WHERE id = %s", stranger.run_id)
    found = world.audit(submission)
    assert sorted(found.broken, key=lambda one: one.what) == [
        Finding(str(stranger.run_id), "99", "a run has its output: succeeded"),
        Finding(str(submission.run_id), None, "a run that failed says why: failed"),
    ]
    report = report_of(found)
    assert report.failures == ["2 break an invariant"]
    assert report.shape()["invariants"] == {"broken": 2}
    assert len(report.shape()["findings"]["broken_invariants"]) == 2
    # What was broken before the session is none of its doing.
    later = replace(world, known=frozenset(world.store.run(broken)))
    assert later.audit(submission).broken == []


# -- what a fault has hit --------------------------------------------------------------------------


def test_a_restart_of_postgres_says_what_it_hit(world: World) -> None:
    waiting = world.engine.submit(world.engine.app.tasks["byrd.chaos.touch"].s(1).set(queue="nobody"))
    submission = world.submit("checkpoints")
    walk = world.step(submission, "walk")
    [(waits,)] = world.cluster.rows("SELECT id FROM byrd.steps WHERE run_id = %s", waiting.id)

    def runs() -> bool:
        return world.cluster.rows("SELECT status FROM byrd.steps WHERE id = %s", walk) == [("running",)]

    wait_until(runs, what="start of the walk")
    field = Field(
        store=world.store, own=None, named=(), redis=None, redis_server=None,
        postgres_server=EmbeddedServer(lambda _hard: None, lambda: None), lease_seconds=6.0, outage_seconds=0.1,
        overlap=False, random=Random(1), told=Event(),
    )  # fmt: skip
    [fault] = the.restart_postgres(field)
    assert ((waits, 0) in fault.hits, (walk, 1) in fault.running) == (True, True)
    assert fault.hit >= 2
    assert fault.since is not None
    assert fault.since < fault.at
    waiting.cancel()
    world.engine.get(submission.run_id).wait(timeout=60)


def test_how_long_what_postgres_has_hit_took(world: World) -> None:
    submission = world.finished("chain")
    rows = world.cluster.rows(
        "SELECT id, started_at, finished_at FROM byrd.steps WHERE run_id = %s ORDER BY no", submission.run_id
    )
    (first, _, ended), (second, started, _), _ = rows
    at = ended - timedelta(milliseconds=10)
    fault = Fault(Kind.POSTGRES_RESTARTED, "", at, ((second, 0),), since=at, running=((first, 1), (second, 7)))
    found = world.audit(submission, faults=(fault,)).recoveries
    assert found[Kind.POSTGRES_RESTARTED].steps == 1
    wait = found[f"{Kind.POSTGRES_RESTARTED}_each_waiting_step"]
    assert (wait.faults, wait.steps) == (1, 1)
    assert wait.max == pytest.approx((started - at).total_seconds(), abs=0.001)
    record = found[f"{Kind.POSTGRES_RESTARTED}_until_recorded"]
    assert (record.faults, record.steps) == (1, 1)
    assert record.max == pytest.approx(0.01, abs=0.001)
