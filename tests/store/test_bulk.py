"""The statements of bulk jobs: what they find, by which index, and that each run is acted on once."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from byrd.errors import IllegalTransitionError, StaleAttempt
from byrd.store import Claim, Store, bulk, runs
from byrd.store.bulk import Filter
from byrd.store.rows import Wakeup, query
from tests.store.test_races import interleave
from tests.store.world import World, nodes, sig

LATER = datetime.now(UTC) + timedelta(days=1)


@pytest.fixture
def world(store: Store) -> World:
    return World(store)


def job_of(world: World) -> Claim:
    """A job that runs, of the workflow that none of them acts on."""
    run = world.submit(sig("job"))
    world.sql("UPDATE byrd.runs SET workflow = 'byrd.bulk' WHERE id = %(id)s RETURNING 1", id=run)
    return world.claim(run, "job")


def pause(conn: Connection, run_id: str) -> list[Wakeup]:
    runs.pause(conn, run_id, by="bulk")
    return []


def batch(world: World, job: Claim, found: Filter, act: bulk.Act = pause, *, limit: int = 2) -> bulk.Progress:
    so_far: bulk.Progress = world.do(bulk.next_batch, job.id, job.attempt, found, act, limit=limit)[0]
    return so_far


def test_each_run_is_acted_on_once_in_the_order_of_submission(world: World) -> None:
    wanted = [world.submit(sig("a")) for _ in range(5)]
    job = job_of(world)
    found = Filter(("running",), LATER)
    assert [batch(world, job, found)[:3] for _ in range(4)] == [(5, 2, 0), (5, 4, 0), (5, 5, 0), (5, 5, 0)]
    assert [world.run(run).status for run in wanted] == ["paused"] * 5
    assert world.run(job.run_id).status == "running"
    assert len(world.sql("SELECT 1 FROM byrd.events WHERE event = 'paused'")) == 5
    world.check()


def test_runs_submitted_at_the_same_time_are_all_found(world: World) -> None:
    wanted = [world.submit(sig("a")) for _ in range(7)]
    world.sql("UPDATE byrd.runs SET created_at = now() RETURNING 1")
    job = job_of(world)
    found = Filter(("paused", "running"), LATER)
    while not batch(world, job, found, limit=3).complete:
        pass
    assert {world.run(run).status for run in wanted} == {"paused"}


def test_a_refusal_leaves_nothing_behind_and_is_counted(world: World) -> None:
    good, bad = world.submit(sig("a")), world.submit(sig("b"))
    job = job_of(world)

    def act(conn: Connection, run_id: str) -> list[Wakeup]:
        pause(conn, run_id)
        if run_id == bad:
            raise IllegalTransitionError("no")
        return []

    so_far = batch(world, job, Filter(("running",), LATER), act, limit=10)
    assert (so_far.matched, so_far.done, so_far.refused, so_far.complete) == (2, 1, 1, True)
    assert (world.run(good).status, world.run(bad).status) == ("paused", "running")


def test_a_batch_that_is_done_again_while_the_first_is_committing_still_changes_nothing(world: World) -> None:
    """A connection that breaks leaves its server at work for a moment, while the same is sent by another one."""
    at, more = 1, True
    while more:
        wanted = [world.submit(sig("a")) for _ in range(2)]
        job = job_of(world)

        def act(conn: Connection, job: Claim = job) -> Any:
            return bulk.next_batch(conn, job.id, job.attempt, Filter(("running",), LATER), pause, limit=3)

        more = interleave(world.store, act, act, at=at)
        assert batch(world, job, Filter(("running",), LATER))[:3] == (2, 2, 0)
        assert [world.run(run).status for run in wanted] == ["paused"] * 2
        world.do(query, "DELETE FROM byrd.runs")
        at += 1
    assert at > 3


def test_an_attempt_that_lost_its_step_acts_on_nothing(world: World) -> None:
    run = world.submit(sig("a"))
    job = job_of(world)
    world.do(runs.pause, job.run_id)
    world.sql("UPDATE byrd.steps SET attempt = attempt + 1 WHERE id = %(id)s RETURNING 1", id=job.id)
    before = world.rows()
    with pytest.raises(StaleAttempt):
        batch(world, job, Filter(("running",), LATER))
    assert world.rows() == before
    assert world.run(run).status == "running"


def test_the_filter(world: World) -> None:
    old, new, other = (world.submit(sig("a")) for _ in range(3))
    world.sql("UPDATE byrd.runs SET created_at = now() - interval '1 h' WHERE id = %(id)s RETURNING 1", id=old)
    world.sql("UPDATE byrd.runs SET workflow = 'other' WHERE id = %(id)s RETURNING 1", id=other)
    error = json.dumps({"exc_type": "KeyError", "exc_message": ['"ä"\0'], "exc_module": "x", "traceback": "hidden"})
    world.sql("UPDATE byrd.runs SET error = %(error)s WHERE id = %(id)s RETURNING 1", id=new, error=error)
    now = datetime.now(UTC)

    def count(**wanted: Any) -> int:
        return int(world.do(bulk.count, Filter(**{"statuses": ("running",), "before": LATER, **wanted})))

    assert count() == 3
    assert count(before=now - timedelta(minutes=1)) == 1
    assert count(after=now - timedelta(minutes=1)) == 2
    assert count(workflow="other") == 1
    assert count(statuses=("failed", "running")) == 3
    assert count(statuses=("failed",)) == 0
    assert [count(error=text) for text in ("KeyError", '"ä"', "hidden", "ValueError")] == [1, 1, 0, 0]


def test_no_query_reads_runs_that_do_not_match(world: World) -> None:
    """Of 20,000 runs that have ended and 200 that have not, a batch reads those by an index."""
    world.sql(
        """INSERT INTO byrd.runs (id, workflow, output, status, created_at, finished_at)
           SELECT gen_random_uuid(), 'w' || mod(n, 3), 0, CASE WHEN mod(n, 100) = 0 THEN 'running' ELSE 'succeeded' END,
                  now() - n * interval '1 s', CASE WHEN mod(n, 100) > 0 THEN now() END
             FROM generate_series(1, 20200) n RETURNING 1"""
    )
    with world.store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        query(conn, "ANALYZE byrd.runs")
    so_far = bulk.Progress(0, at=(datetime.now(UTC) - timedelta(hours=3)).isoformat(), run="f" * 32)
    for found in (
        Filter(("running",), LATER),
        Filter(("paused", "running"), LATER, workflow="w1"),
        Filter(("running",), LATER, after=datetime.now(UTC) - timedelta(hours=1)),
    ):
        for where in (bulk.Progress(0), so_far):
            plan = world.do(_plan, found, where)
            scans = [node for node in nodes(plan) if "Scan" in node["Node Type"] and node.get("Relation Name")]
            assert scans
            assert all(node["Node Type"] != "Seq Scan" for node in scans), plan
            read = sum((n["Actual Rows"] + n.get("Rows Removed by Filter", 0)) * n["Actual Loops"] for n in scans)
            assert read <= 250, plan


def _plan(conn: Connection, found: Filter, so_far: bulk.Progress) -> dict[str, Any]:
    sql, params = bulk.matching_sql(found, so_far, 50)
    plan: dict[str, Any] = query(conn, f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}", params).scalar_one()[0]["Plan"]
    return plan
