"""The threads beside a worker's pool: what holds one up must not hold up the others, or what they know be lost."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import psycopg2
import pytest
from celery.exceptions import TimeLimitExceeded

from byrd.embedded import EmbeddedPostgres
from tests.cluster import Cluster, ClusterFactory, wait_until
from tests.invariants import check_database
from tests.reliability.test_workers import APP, ended, history, lines, running


def test_a_run_that_somebody_has_to_himself_costs_no_lease(cluster: Cluster, tmp_path: Path) -> None:
    """A command on a huge run, say: a failure waits to be recorded, and the worker keeps its other steps."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=2)
    cluster.worker(APP, concurrency=2, queues=["other"])  # it would recover them
    go = tmp_path / "go"
    beside = app.engine.submit(app.wait_for_file.s(str(go), 1))
    wait_until(lambda: running(beside))
    limited = app.engine.submit(app.hard.s(60))
    wait_until(lambda: running(limited))
    with closing(psycopg2.connect(cluster.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(1652126308, hashtext(%s))", (limited.id,))
        worker.wait_for_log("Hard time limit")
        time.sleep(7)  # two leases
        assert running(limited)
    with pytest.raises(TimeLimitExceeded):
        limited.get(timeout=30)
    go.touch()
    assert beside.get(timeout=30) == 1
    assert history(cluster, beside) == []
    check_database(cluster.database_url)


def test_recovery_works_with_a_lease_shorter_than_the_pause_between_sweeps(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    settings = {"TEST_LEASE_SECONDS": "1", "TEST_SWEEP_SECONDS": "3"}
    doomed = cluster.worker(APP, env=settings)
    go = tmp_path / "go"
    run = app.engine.submit(app.wait_for_file.s(str(go), 1))
    wait_until(lambda: running(run))
    cluster.worker(APP, env=settings)
    doomed.kill()
    wait_until(lambda: run.steps()[0].attempt == 2, timeout=60)
    go.touch()
    assert run.get(timeout=30) == 1


def test_a_time_limit_that_passes_while_postgres_is_away_fails_no_step_that_is_done(
    cluster_on: ClusterFactory, own_postgres: EmbeddedPostgres, broker_url: str, tmp_path: Path
) -> None:
    cluster = cluster_on(database_url=own_postgres.url, broker_url=broker_url)
    app = cluster.app(APP)
    worker = cluster.worker(APP)
    go = tmp_path / "go"
    run = app.engine.submit(app.wait_for_file.s(str(go), 1).set(soft_time_limit=4) | app.add.s(1))
    wait_until(lambda: running(run))
    own_postgres.kill()
    go.touch()
    worker.wait_for_log("was being recorded at its soft time limit")
    own_postgres.start()
    assert run.get(timeout=60) == 2
    assert history(cluster, run) == []


def test_a_soft_shutdown_tells_checkpoint_tasks_at_once(cluster: Cluster, tmp_path: Path) -> None:
    """They hand back at their next checkpoint; what is cut off when the time is over would be repeated."""
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=1, env={"REMAP_SIGTERM": "SIGQUIT", "TEST_SOFT_SHUTDOWN": "5"})
    notes = tmp_path / "notes"
    run = app.engine.submit(app.count_up.s(str(notes), 150, 0.1))
    wait_until(lambda: len(lines(notes)) > 5)
    cluster.worker(APP, concurrency=1)
    os.kill(worker.pid, signal.SIGTERM)
    told = time.time()
    assert run.get(timeout=60) == {"cursor": 149, "completed": 150, "failed": 0}
    seen = lines(notes)
    assert [n for n, _, _ in seen] == list(range(150))
    moved = next(i for i, (_, pid, _) in enumerate(seen) if pid != seen[0][1])
    assert seen[moved][2] - told < 4
    assert history(cluster, run) == [(0, 1, "handed_back")]
    ended(worker)


def test_a_second_sigterm_in_a_soft_shutdown_gives_back_what_runs(cluster: Cluster, tmp_path: Path) -> None:
    """As docker-compose.yml has it: whoever asks twice does not wait until the time is over."""
    app, go = cluster.app(APP), tmp_path / "go"
    worker = cluster.worker(APP, concurrency=1, env={"REMAP_SIGTERM": "SIGQUIT", "TEST_SOFT_SHUTDOWN": "600"})
    run = app.engine.submit(app.wait_for_file.s(str(go), 1) | app.add.s(1))
    wait_until(lambda: running(run))
    cluster.worker(APP, concurrency=1)
    os.kill(worker.pid, signal.SIGTERM)
    worker.wait_for_log("Initiating Soft Shutdown")
    assert run.steps()[0].attempt == 1
    os.kill(worker.pid, signal.SIGTERM)
    wait_until(lambda: run.steps()[0].attempt == 2, timeout=60)
    go.touch()
    assert run.get(timeout=60) == 2
    assert history(cluster, run) == [(0, 1, "handed_back")]
    check_database(cluster.database_url)


def test_a_cold_shutdown_ends_the_lease(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    worker = cluster.worker(APP, env={"TEST_LEASE_SECONDS": "600"})
    run = app.engine.submit(app.wait_for_file.s(str(tmp_path / "go"), 1))
    wait_until(lambda: running(run))
    os.kill(worker.pid, signal.SIGQUIT)
    ended(worker)
    assert cluster.rows("SELECT hostname FROM byrd.workers") == []
    assert [step.status for step in run.steps()] == ["ready"]


def test_a_loss_of_the_broker_is_noticed_again_by_the_next_if_the_first_dies_over_it(cluster: Cluster) -> None:
    """Who has noticed it, and is killed before the steps are marked for it, leaves the broker without its mark."""
    app = cluster.app(APP)
    first = cluster.worker(APP, queues=["other"])
    wait_until(lambda: cluster.rows("SELECT 1 FROM byrd.brokers"))  # the broker is new, and gets its mark
    run = app.engine.submit(app.add.s(1, 2))
    # Nobody would look at the step for an hour, but for the loss.
    cluster.rows("UPDATE byrd.steps SET wake_at = now() + interval '1 hour'")
    cluster.rows(_HOLD_UP)
    with closing(psycopg2.connect(cluster.database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(1)")
        with cluster.redis() as redis:
            wait_until(lambda: redis.keys("byrd.relay.*"))
            redis.flushdb()
        wait_until(lambda: held_up(cluster))
        first.kill()
    wait_until(lambda: not held_up(cluster))
    cluster.rows("DROP TRIGGER hold_up ON byrd.steps")
    cluster.worker(APP)
    assert run.get(timeout=30) == 3


#: Whoever looks at published steps again, for the broker has lost their messages, waits for a lock first.
_HOLD_UP = """
CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS
  'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END';
CREATE TRIGGER hold_up BEFORE UPDATE ON byrd.steps FOR EACH ROW
  WHEN (NEW.wake_at = NEW.ready_at AND OLD.wake_at > OLD.ready_at) EXECUTE FUNCTION hold_up()
"""


def held_up(cluster: Cluster) -> list[tuple[int]]:
    """Return the sessions that wait for that lock."""
    return cluster.rows(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = 1 AND classid = 0 AND NOT granted"
    )
