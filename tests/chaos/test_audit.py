"""The audit of `byrd chaos` finds what is wrong: here it is put there by hand, after runs that went well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from byrd.chaos import ledger, tasks
from byrd.chaos.audit import audit
from byrd.chaos.faults import Fault, Kind
from byrd.chaos.report import Audit, Finding, Report
from byrd.chaos.submitter import Submission
from byrd.store import Store
from tests.cluster import Cluster

APP = "tests.apps.basic"


@dataclass(frozen=True)
class World:
    """A cluster with a worker that knows the load."""

    cluster: Cluster
    engine: Any
    shapes: dict[str, tasks.Shape]
    store: Store

    def submit(self, name: str, number: int = 7) -> Submission:
        run = self.engine.submit(self.shapes[name].build(number))
        return Submission(f"key-{run.id}", self.shapes[name], number, datetime.now(UTC), run.id)

    def finished(self, name: str) -> Submission:
        submission = self.submit(name)
        self.engine.get(submission.run_id).wait(timeout=60)
        return submission

    def audit(self, *submissions: Submission, faults: tuple[Fault, ...] = ()) -> Audit:
        return audit(self.store, submissions, faults, why=lambda run_id: self.engine.get(run_id).why())

    def step(self, submission: Submission, task: str) -> str:
        [(step,)] = self.cluster.rows(
            "SELECT id FROM byrd.steps WHERE run_id = %s AND task = %s ORDER BY no LIMIT 1",
            submission.run_id,
            tasks.PREFIX + task,
        )
        return str(step)

    def leave_effect(self, submission: Submission, step: str, attempt: int) -> None:
        self.store.run(ledger.record_effect, ledger.new_effect(), str(submission.run_id), step, attempt)


@pytest.fixture(scope="module")
def world(module_cluster: Cluster) -> Iterator[World]:
    module = module_cluster.app(APP)
    tasks.register(module.app)
    store = Store(module_cluster.database_url)
    store.run(ledger.create, watch=True)
    module_cluster.worker(APP, queues=[tasks.QUEUE], options=["-I", "byrd.chaos.load"])
    yield World(module_cluster, module.engine, {shape.name: shape for shape in tasks.shapes(module.app)}, store)
    store.close()


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
    world.cluster.rows("UPDATE byrd.steps SET result = '12' WHERE run_id = %s AND result = '50'", submission.run_id)
    found = world.audit(submission)
    assert [one.what for one in found.wrong] == ["chord: its result is 12, and should be 50"]
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


def test_an_effect_whose_reason_is_a_fault(world: World) -> None:
    submission = world.finished("chain")
    step = world.step(submission, "touch")
    world.leave_effect(submission, step, 2)
    world.cluster.rows("UPDATE byrd.steps SET attempt = 2 WHERE id = %s", step)
    world.cluster.rows(
        "INSERT INTO byrd.attempts (step_id, attempt, outcome, worker) VALUES (%s, 1, 'preempted', 'w@there')", step
    )
    ours = Fault(Kind.WORKER_KILLED, "", datetime.now(UTC) - timedelta(seconds=2), ((step, 1),), "w@there")
    explained = world.audit(submission, faults=(ours,))
    assert (explained.repeated, explained.unexplained, explained.unprovoked) == ({"worker_killed": 1}, [], [])
    other = world.audit(submission)
    assert (other.repeated, other.unexplained) == ({"preempted": 1}, [])
    assert [one.step for one in other.unprovoked] == [step]
