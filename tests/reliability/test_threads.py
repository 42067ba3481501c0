"""The threads beside a worker's pool: what holds one up must not hold up the others, or what they know be lost."""

from __future__ import annotations

import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from celery.exceptions import TimeLimitExceeded

from byrd.embedded import EmbeddedPostgres
from byrd.store import sweeps
from byrd.worker import Settings, Sweeper
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
    app = cluster.app(APP)
    run = app.engine.submit(app.add.s(1, 2))
    sweeper = Sweeper(app.engine.runtime, Settings())
    try:
        sweeper.relay()  # the broker is new, and gets its mark
        assert _doubted(cluster) == 0
        with cluster.redis() as redis:
            redis.flushdb()
        sweeper.store.run(sweeps.doubt_all)  # as one does that is killed before it has marked the broker
        cluster.rows("UPDATE byrd.steps SET wake_at = now() + interval '1 hour' RETURNING 1")
        sweeper._last_look = 0.0
        sweeper.relay()
        with cluster.redis() as redis:
            assert redis.llen("celery") == 1
            assert len(redis.keys("byrd.relay.*")) == 1
    finally:
        sweeper.stop()
    cluster.worker(APP)
    assert run.get(timeout=30) == 3


def _doubted(cluster: Cluster) -> Any:
    return cluster.rows("SELECT count(*) FROM byrd.steps WHERE status = 'ready' AND wake_at = ready_at")[0][0]
