"""The figures for a monitoring system: right in each state, and read from what is open alone."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, group

import byrd
from byrd.errors import StoreUnavailableError
from byrd.limits import Limit
from byrd.store import Store, limits, metrics, notices, runs, sagas, sweeps
from byrd.store.metrics import Metrics, QueueMetrics
from byrd.store.rows import query
from tests.store.test_limits import API
from tests.store.test_work_plans import FILL
from tests.store.world import World, nodes, sig

NO_RUNS = {"running": 0, "paused": 0, "cancelling": 0, "compensating": 0, "rollback_stuck": 0}
NO_STEPS = {"due": 0, "later": 0, "running": 0, "waiting": 0}


def read(world: World) -> Metrics:
    found: Metrics = world.do(metrics.read)
    return found


def test_where_nothing_is_all_is_zero(world: World) -> None:
    found = read(world)
    assert (found.runs, found.steps, found.queues) == (NO_RUNS, NO_STEPS, {"work": QueueMetrics(0, 0.0)})
    assert (found.workers, found.worker_processes, found.workers_lost) == (1, 1, 0)
    assert (found.rollbacks_stuck, found.notices_undelivered) == (0, 0)


def running(world: World) -> None:
    world.submit(sig("a", queue="other"))


def done(world: World) -> None:
    assert world.drive(world.submit(chain(sig("a"), sig("b")))).status == "succeeded"


def failed(world: World) -> None:
    world.failing = {"a"}
    assert world.drive(world.submit(sig("a"))).status == "failed"


def delayed(world: World) -> None:
    world.submit(sig("a", countdown=3600))


def pending(world: World) -> None:
    world.claim(world.submit(chain(sig("a"), sig("b"))), "a")


def asleep(world: World) -> None:
    world.submit(chain(byrd.sleep(3600), sig("a")))


def paused(world: World) -> None:
    world.do(runs.pause, world.submit(sig("a")))


def cancelling(world: World) -> None:
    run = world.submit(group(sig("a"), sig("b")))
    world.claim(run, "a")
    world.do(runs.cancel, run)


def compensating(world: World) -> None:
    world.failing = {"bad"}
    assert world.drive(world.submit(chain(sig("saga_a"), sig("bad"))), until=["bad"]).status == "compensating"


def limited(world: World) -> None:
    run = world.submit(group(sig("a"), sig("a")))
    first, second = (step for step in world.steps(run) if step.task == "a")
    for step in (first, second):
        world.do(
            limits.admit, step.id, step.attempt, limit=Limit(concurrency=1, name=API.name), place=API, task="a",
            worker_id=world.worker_id, pid=1, token=str(uuid.uuid4()),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "status", "steps", "due"),
    [
        (running, "running", {"due": 1}, {"other": 1}),
        (done, None, {}, {}),
        (failed, None, {}, {}),
        (delayed, "running", {"later": 1}, {}),
        (pending, "running", {"running": 1}, {}),
        (asleep, "running", {"waiting": 1}, {}),
        (paused, "paused", {"later": 1}, {}),
        (cancelling, "cancelling", {"running": 1}, {}),
        (compensating, "compensating", {"due": 1}, {"work": 1}),
        (limited, "running", {"running": 1, "later": 1}, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_state_is_counted_where_it_belongs(
    world: World, make: Any, status: str | None, steps: dict[str, int], due: dict[str, int]
) -> None:
    make(world)
    found = read(world)
    assert found.runs == NO_RUNS | ({status: 1} if status else {})
    assert found.steps == NO_STEPS | steps
    assert {name: queue.steps_due for name, queue in found.queues.items()} == {"work": 0} | due


def test_a_step_is_due_whether_its_message_was_sent_or_not(world: World) -> None:
    world.submit(sig("solo"))
    world.submit(sig("shared"), shared=True)
    world.sql("UPDATE byrd.steps SET sends = 0, wake_at = now() + interval '20 s' WHERE task = 'solo'")
    world.submit(sig("solo"))
    assert {(row.sends > 0, row.solo) for row in world.sql("SELECT sends, solo FROM byrd.steps")} == {
        (False, True), (True, False), (True, True),
    }  # fmt: skip
    world.sql("UPDATE byrd.steps SET run_at = run_at - interval '90 s', ready_at = ready_at - interval '90 s'")
    found = read(world)
    assert (found.steps["due"], found.queues["work"].steps_due) == (3, 3)
    assert 90 <= found.queues["work"].oldest_due_seconds < 600


def test_a_rollback_that_is_stuck_is_counted_until_it_is_skipped(world: World) -> None:
    world.failing = {"bad", "undo_saga_a"}
    run = world.submit(chain(sig("saga_a"), sig("bad")))
    assert world.drive(run).status == "rollback_stuck"
    found = read(world)
    assert (found.rollbacks_stuck, found.runs, found.steps) == (1, NO_RUNS | {"rollback_stuck": 1}, NO_STEPS)
    assert found.notices_undelivered == 1
    [notice] = world.do(notices.take)
    assert read(world).notices_undelivered == 1
    world.do(notices.delivered, notice.id)
    assert read(world).notices_undelivered == 0
    world.do(sagas.skip, run, world.step(run, "undo_saga_a").no, reason="the hotel is gone")
    assert (read(world).rollbacks_stuck, read(world).runs) == (0, NO_RUNS)


@pytest.mark.parametrize("how", ["its lease ran out", "somebody deleted it"])
def test_a_worker_that_is_gone_is_lost_until_its_steps_are_recovered(world: World, how: str) -> None:
    idle, busy = world.add_worker(), world.add_worker()
    run = world.submit(group(sig("a"), sig("b")))
    for task in ("a", "b"):
        world.claim(run, task, worker_id=busy)
    assert (read(world).workers, read(world).workers_lost) == (3, 0)
    world.end_lease(idle)
    if how == "somebody deleted it":
        world.sql("DELETE FROM byrd.workers WHERE id = %(id)s", id=busy)
    world.end_lease(busy)
    found = read(world)
    assert (found.workers, found.worker_processes, found.workers_lost, found.steps["running"]) == (1, 1, 1, 2)
    world.do(sweeps.recover)
    found = read(world)
    assert (found.workers_lost, found.steps["running"], found.steps["due"]) == (0, 0, 2)


def test_a_worker_that_stops_still_counts_and_its_queues_do_not(world: World) -> None:
    world.sql("UPDATE byrd.workers SET stopping = true, concurrency = 8")
    found = read(world)
    assert (found.workers, found.worker_processes, found.queues) == (1, 8, {})


def test_it_reads_only_and_leaves_the_connection_as_it_was(world: World) -> None:
    before = world.rows()
    names = ("enable_seqscan", "jit", "statement_timeout", "transaction_read_only")
    kept = [world.sql(f"SHOW {name}") for name in names]
    read(world)
    assert (world.rows(), [world.sql(f"SHOW {name}") for name in names]) == (before, kept)


def test_a_postgres_that_takes_too_long_is_one_that_does_not_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "'5s'" in metrics._SETTINGS
    monkeypatch.setattr(metrics, "_SETTINGS", metrics._SETTINGS.replace("'5s'", "'100ms'"))
    with world.store.engine.begin() as conn:
        query(conn, "LOCK TABLE byrd.runs IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreUnavailableError, match="does not answer: canceling statement"):
            world.store.with_patience(0.0).run(metrics.read)
    assert read(world).runs == NO_RUNS


# ------------------------------------------------------------------------------------------------- its plan


FINISHED, WAITING = 20_000, 2_000
#: All of them are partial but that of runs, where the status is the condition.
INDEXES = {"runs_status", "steps_due", "steps_sent", "steps_shared", "steps_running", "steps_waiting", "notices_due"}


@pytest.fixture
def own_store(database_url: str) -> Iterator[Store]:
    found = Store(database_url)
    yield found
    found.close()


@pytest.mark.parametrize("known", ["not analysed", "analysed", "analysed while all were open"])
def test_what_has_ended_is_never_read(own_store: Store, known: str) -> None:
    world = World(own_store)
    if known == "analysed while all were open":
        world.do(query, FILL, {"finished": 0, "waiting": WAITING})
        world.do(query, "ANALYZE byrd.runs, byrd.steps, byrd.notices, byrd.workers")
        world.do(query, "DELETE FROM byrd.runs")
    world.do(query, FILL, {"finished": FINISHED, "waiting": WAITING})
    if known == "analysed":
        world.do(query, "ANALYZE byrd.runs, byrd.steps, byrd.notices, byrd.workers")
    with own_store.engine.begin() as conn:
        query(conn, metrics._SETTINGS)
        [plan] = query(conn, f"EXPLAIN (ANALYZE, FORMAT JSON) {metrics._FIGURES}").scalar_one()
    seen: set[str] = set()
    for node in nodes(plan["Plan"]):
        if node.get("Relation Name") in ("runs", "steps", "notices"):
            assert node["Node Type"] != "Seq Scan", node
        index = node.get("Index Name", "workers")
        if not index.startswith("workers"):
            seen.add(index)
            assert index in INDEXES, node
            assert index != "runs_status" or "status = '" in node["Index Cond"], node
            read_rows = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            assert read_rows <= 2 * WAITING, node  # rows that were deleted are met, too
    assert seen == INDEXES
    found = world.do(metrics.read)
    assert found.runs == NO_RUNS | {"running": WAITING * 4 // 5, "paused": WAITING // 5}
    # Of five, one is paused and one is for tomorrow.
    assert found.steps == NO_STEPS | {"due": WAITING * 3 // 5, "later": WAITING * 2 // 5}
