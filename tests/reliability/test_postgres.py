"""Postgres holds the truth: while it is away, full or refuses, workers wait; nothing is recorded twice or lost."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import psycopg2
import pytest
from celery import chain, chord, group
from psycopg2 import sql

import byrd
from byrd import embedded, store
from byrd.embedded import EmbeddedPostgres
from tests.cluster import Cluster, ClusterFactory, wait_until
from tests.invariants import check_database
from tests.reliability.outages import (
    APP,
    BOUND_SECONDS,
    Struck,
    alive,
    check_chains,
    log,
    measured,
    no_preemption,
    submit_chains,
)

TRANSACTIONS = "tests.apps.transactions"
OUTAGE_SECONDS = 30.0


@pytest.fixture
def own(cluster_on: ClusterFactory, own_postgres: EmbeddedPostgres, broker_url: str) -> Cluster:
    """A cluster whose Postgres belongs to the test."""
    return cluster_on(database_url=own_postgres.url, broker_url=broker_url)


def once(cluster: Cluster) -> None:
    """Each step that ran was claimed once, so nothing was taken from a worker that lived."""
    no_preemption(cluster)
    assert cluster.rows("SELECT run_id, no, attempt FROM byrd.steps WHERE attempt > 1") == []


def finished(cluster: Cluster) -> int:
    return int(cluster.rows("SELECT count(*) FROM byrd.steps WHERE finished_at IS NOT NULL")[0][0])


def set_for_database(cluster: Cluster, statement: str) -> None:
    """Change a default of the database; it holds for connections made from now on."""
    with closing(psycopg2.connect(cluster.database_url)) as connection:
        connection.set_session(autocommit=True, readonly=False)
        name = sql.Identifier(connection.info.dbname)
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL("ALTER DATABASE {} " + statement).format(name))


def disconnect_all(cluster: Cluster) -> None:
    """End all other connections to the database."""
    cluster.rows(
        """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid()"""
    )


@contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """Have a cursor in a transaction of the test's, ended by hand or with the block."""
    with closing(psycopg2.connect(cluster.database_url)) as connection, connection.cursor() as cursor:
        yield cursor


# -- away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restarted_under_load(own: Cluster, own_postgres: EmbeddedPostgres, mode: Literal["fast", "immediate"]) -> None:
    app = own.app(APP)
    worker = own.worker(APP)
    runs = submit_chains(app, 60)
    wait_until(lambda: finished(own) > 20)
    own_postgres.restart(mode)
    answers = time.time()
    check_chains(own, runs)
    assert measured(f"Postgres restarted ({mode})", own, answers) < BOUND_SECONDS
    once(own)
    alive(worker)


def test_waits_outlive_a_restart(own: Cluster, own_postgres: EmbeddedPostgres) -> None:
    """Those that were due meanwhile are ended once Postgres is back."""
    app = own.app("tests.apps.waiting")
    worker = own.worker("tests.apps.waiting")
    runs = [app.engine.submit(chain(byrd.sleep(1.5), byrd.wait_for("ok"), app.echo.s())) for _ in range(20)]
    for run in runs[:10]:
        run.signal("ok", 1)
    own_postgres.kill()
    time.sleep(2)
    own_postgres.start()
    for run in runs[10:]:
        run.signal("ok", 1)
    assert [run.get(timeout=30) for run in runs] == [1] * 20
    once(own)
    alive(worker)


def test_30_seconds_without_postgres(own: Cluster, own_postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    """Steps that end meanwhile are recorded afterwards, once; nobody takes them for dead."""
    pools = ("prefork", "threads", "solo")
    workers = [own.worker(APP, pool=pool, queues=[pool], wait=False) for pool in pools]
    for worker in workers:
        worker.wait_for_log(r" ready\.", timeout=60)
    struck = [Struck(own, tmp_path / pool, held=1, queued=3, queue=pool) for pool in pools]
    own_postgres.kill()
    gone = time.monotonic()
    for each in struck:
        each.finish()
    wait_until(lambda: time.monotonic() - gone > OUTAGE_SECONDS, timeout=OUTAGE_SECONDS + 10)
    alive(*workers)
    own_postgres.start()
    answers = time.time()
    for each in struck:
        each.check()
    for pool, each in zip(pools, struck, strict=True):
        runs = [*each.held, *each.queued]
        assert measured(f"Postgres away for 30 s ({pool})", own, answers, runs) < BOUND_SECONDS
    once(own)
    alive(*workers)


def test_all_connections_ended_again_and_again(cluster: Cluster) -> None:
    app = cluster.app(APP)
    worker = cluster.worker(APP)
    runs = submit_chains(app, 60)
    wait_until(lambda: finished(cluster) > 10)
    for _ in range(15):
        disconnect_all(cluster)
        before = finished(cluster)
        wait_until(lambda before=before: finished(cluster) > before or finished(cluster) == 240)  # type: ignore[misc]
    check_chains(cluster, runs)
    once(cluster)
    alive(worker)


def test_failed_over_to_a_read_only_standby(cluster: Cluster, tmp_path: Path) -> None:
    """Connections to what has become a standby are given up, for the same address may lead to the primary by then."""
    worker = cluster.worker(APP)
    struck = Struck(cluster, tmp_path / "go")
    set_for_database(cluster, "SET default_transaction_read_only = on")
    disconnect_all(cluster)
    struck.finish()
    worker.wait_for_log("read-only transaction")
    set_for_database(cluster, "RESET default_transaction_read_only")
    answers = time.time()
    struck.check()
    assert measured("Postgres read-only", cluster, answers) < BOUND_SECONDS
    once(cluster)
    alive(worker)


# -- full ------------------------------------------------------------------------------------------


def test_too_many_connections(cluster_on: ClusterFactory, broker_url: str, tmp_path: Path) -> None:
    with embedded.postgres(in_memory=True, settings={"max_connections": "20"}) as server:
        store.migrate(server.url)
        own = cluster_on(database_url=server.url, broker_url=broker_url)
        worker = own.worker(APP)
        struck = Struck(own, tmp_path / "go", queued=5)
        own.app(APP).engine.close()  # its connections would come and go
        taken: list[Any] = []
        try:
            _take_all(server, taken)
            struck.finish()
            worker.wait_for_log("too many clients")
        finally:
            for connection in taken:
                connection.close()
        answers = time.time()
        struck.check()
        assert measured("Postgres out of connections", own, answers) < BOUND_SECONDS
        once(own)
        alive(worker)


def _take_all(server: EmbeddedPostgres, taken: list[Any]) -> None:
    """Take every connection that the server has, those of others too."""

    def none_left() -> bool:
        try:
            while True:
                taken.append(psycopg2.connect(server.url))
        except psycopg2.OperationalError:
            with taken[0].cursor() as cursor:
                cursor.execute(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'byrd'"
                )
                [(others,)] = cursor.fetchall()
            taken[0].commit()
            return bool(others == 0)

    wait_until(none_left)


def test_a_full_pool_of_user_transactions(cluster: Cluster, tmp_path: Path) -> None:
    """25 open transactions of users' own are all that a worker has; they cost it neither its lease nor its records."""
    cluster.rows("CREATE TABLE effects (key int PRIMARY KEY, value int)")
    app = cluster.app(TRANSACTIONS)
    go = tmp_path / "go"
    worker = cluster.worker(TRANSACTIONS, pool="threads", concurrency=30)
    runs = [app.engine.submit(app.write_and_wait.s(n, str(go))) for n in range(29)]
    open_transactions = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND query ~ 'INTO effects'"
    wait_until(lambda: len(cluster.rows(open_transactions)) >= 25, timeout=60)
    full = time.monotonic()
    assert app.engine.submit(app.echo.s(2)).get(timeout=30) == 2
    wait_until(lambda: time.monotonic() - full > 6, timeout=30)  # two leases
    no_preemption(cluster)
    go.touch()
    assert [run.get(timeout=60) for run in runs] == list(range(29))
    assert cluster.rows("SELECT count(*) FROM effects") == [(29,)]
    no_preemption(cluster)
    alive(worker)
    check_database(cluster.database_url)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 32 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system, on Linux")
    folder = Path(tempfile.mkdtemp(prefix="byrd-small-disk-", dir="/tmp"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "byrd-small-disk", str(folder)],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if mounted.returncode != 0:
        folder.rmdir()
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def test_disk_full(
    cluster_on: ClusterFactory, own_postgres: EmbeddedPostgres, broker_url: str, small_disk: Path
) -> None:
    """Results that find no room are recorded when there is some again."""
    shutil.chown(small_disk, psutil.Process(own_postgres.pid).username())
    with closing(psycopg2.connect(own_postgres.url)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        cursor.execute("CREATE TABLESPACE small LOCATION %s", (str(small_disk),))
        cursor.execute("CREATE DATABASE small TABLESPACE small")
    url = own_postgres.url.rpartition("/")[0] + "/small"
    store.migrate(url)
    own = cluster_on(database_url=url, broker_url=broker_url)
    app = own.app(APP)
    worker = own.worker(APP)
    value = secrets.token_urlsafe(150_000)  # Postgres cannot compress it
    run = app.engine.submit(app.echo.s(value).set(countdown=3) | app.echo.s() | app.echo.s())
    junk = small_disk / "junk"
    with pytest.raises(OSError, match="No space left"):
        junk.write_bytes(bytes(shutil.disk_usage(small_disk).total))
    worker.wait_for_log("No space left on device", timeout=60)
    alive(worker)
    junk.unlink()
    answers = time.time()
    assert run.get(timeout=60) == value
    assert measured("Postgres: disk full", own, answers) < BOUND_SECONDS
    once(own)
    alive(worker)
    check_database(url)


# -- refusing --------------------------------------------------------------------------------------


def test_statement_timeout(cluster: Cluster, tmp_path: Path) -> None:
    set_for_database(cluster, "SET statement_timeout = '200ms'")
    worker = cluster.worker(APP)
    struck = Struck(cluster, tmp_path / "go", queued=3)
    with connected(cluster) as cursor:
        cursor.execute("SELECT 1 FROM byrd.steps WHERE status = 'running' FOR UPDATE")
        struck.finish()
        worker.wait_for_log("canceling statement due to statement timeout")
    struck.check()
    once(cluster)
    alive(worker)


@pytest.mark.parametrize(("how", "attempts"), [("transaction", 6), ("save", 1)])
def test_a_user_transaction_that_is_always_too_slow(cluster: Cluster, how: str, attempts: int) -> None:
    """The time-out may have been bad luck, so it is tried again, but not for ever: then the error is the task's."""
    set_for_database(cluster, "SET statement_timeout = '300ms'")
    cluster.worker(TRANSACTIONS)
    run = cluster.app(TRANSACTIONS).engine.submit(cluster.app(TRANSACTIONS).too_slow.s(how))
    with pytest.raises(Exception, match="canceling statement due to statement timeout"):
        run.get(timeout=60)
    [step] = run.steps()
    assert (step.status, step.attempt) == ("failed", attempts)
    once_per_attempt = cluster.rows("SELECT attempt, outcome FROM byrd.attempts ORDER BY attempt")
    assert once_per_attempt == [(n, "handed_back") for n in range(1, attempts)] + [(attempts, "failed")]


def test_deadlock(cluster: Cluster, tmp_path: Path) -> None:
    """The worker's transaction is the one that is broken off; it does the same again."""
    worker = cluster.worker(APP)
    struck = Struck(cluster, tmp_path / "go", held=1, queued=0)
    [step, successor] = struck.held[0].steps()
    with connected(cluster) as cursor:
        cursor.execute("SET deadlock_timeout = '60s'")  # so it is never this transaction that notices first
        cursor.execute("SELECT 1 FROM byrd.steps WHERE id = %s FOR UPDATE", (successor.id,))
        struck.finish()
        waiting = """SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
                       AND application_name = 'byrd'"""
        wait_until(lambda: cluster.rows(waiting))
        cursor.execute("SELECT 1 FROM byrd.steps WHERE id = %s FOR UPDATE", (step.id,))  # the cycle is closed
        assert cursor.fetchall() == [(1,)]
        cursor.execute("SELECT pg_stat_force_next_flush()")
    struck.check()
    wait_until(
        lambda: cluster.rows("SELECT 1 FROM pg_stat_database WHERE datname = current_database() AND deadlocks > 0"),
        what="a deadlock in Postgres' statistics",
    )
    once(cluster)
    alive(worker)


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_database_of_higher_isolation(cluster: Cluster, level: str) -> None:
    """Byrd's own transactions keep to the level that they are written for."""
    set_for_database(cluster, f"SET default_transaction_isolation = '{level}'")
    app = cluster.app(APP)
    workers = [cluster.worker(APP), cluster.worker(APP, pool="threads")]
    runs = [app.engine.submit(chord(group(app.add.s(n, 1) for n in range(6)), app.total.s())) for _ in range(30)]
    assert [run.get(timeout=90) for run in runs] == [21] * 30
    wait_until(lambda: all(run.status == "succeeded" for run in runs))
    once(cluster)
    alive(*workers)
    check_database(cluster.database_url)


def test_serialization_errors_of_user_transactions(cluster: Cluster) -> None:
    """A transaction of the user's own that loses against another is rolled back whole, and its step starts again."""
    set_for_database(cluster, "SET default_transaction_isolation = 'serializable'")
    cluster.rows("CREATE TABLE effects (key int PRIMARY KEY, value int)")
    cluster.rows("INSERT INTO effects VALUES (1, 0)")
    app = cluster.app(TRANSACTIONS)
    worker = cluster.worker(TRANSACTIONS, pool="threads", concurrency=4)
    runs = [app.engine.submit(app.add_up.s(1)) for _ in range(12)]
    assert sorted(run.get(timeout=60) for run in runs) == list(range(12))
    assert cluster.rows("SELECT value FROM effects") == [(12,)]
    assert cluster.rows("SELECT 1 FROM byrd.steps WHERE attempt > 1"), "no two of them met"
    no_preemption(cluster)
    alive(worker)
    check_database(cluster.database_url)


def test_idle_in_transaction_timeout(cluster: Cluster, tmp_path: Path) -> None:
    """A step that is too slow between two statements of its transaction loses the transaction, and starts again."""
    set_for_database(cluster, "SET idle_in_transaction_session_timeout = '500ms'")
    cluster.rows("CREATE TABLE effects (key int PRIMARY KEY, value int)")
    app = cluster.app(TRANSACTIONS)
    go = tmp_path / "go"
    worker = cluster.worker(TRANSACTIONS)
    run = app.engine.submit(app.write_and_wait.s(1, str(go)))
    idle = """SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'
                AND query ~ 'effects'"""
    [running] = wait_until(lambda: cluster.rows(idle))
    wait_until(lambda: not cluster.rows("SELECT 1 FROM pg_stat_activity WHERE pid = %s", running[0]))
    go.touch()
    assert run.get(timeout=60) == 1
    assert run.steps()[0].attempt == 2
    assert cluster.rows("SELECT key FROM effects") == [(1,)]
    no_preemption(cluster)
    alive(worker)
    check_database(cluster.database_url)


def test_a_worker_frozen_inside_a_transaction(cluster: Cluster, tmp_path: Path) -> None:
    """What it has locked is given free after ten seconds, though its machine still answers for it."""
    app = cluster.app(APP)
    frozen = cluster.worker(APP)
    struck = Struck(cluster, tmp_path / "go", held=1, queued=0)
    with connected(cluster) as cursor:
        cursor.execute("SELECT 1 FROM byrd.workers FOR UPDATE")
        # By a message of its own: what a slice does is one statement, and a transaction by itself.
        late = app.engine.submit(app.add.s(1, 1).set(time_limit=60))
        claiming = """SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
                        AND query ~ 'SET status = .running'"""
        wait_until(lambda: cluster.rows(claiming), what="a claim that waits for the worker's row")
        frozen.sigstop()
    since = time.monotonic()
    try:
        locked = """SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'
                      AND query ~ 'SET status = .running'"""
        wait_until(lambda: cluster.rows(locked), what="a claim whose answer nobody reads")
        struck.finish()
        cluster.worker(APP, wait=False)
        wait_until(lambda: not cluster.rows(locked), timeout=30, what="the end of its transaction")
        struck.check(timeout=60)
        assert late.get(timeout=60) == 2
        log.info("frozen inside a transaction: all done by others after %.1f s", time.monotonic() - since)
    finally:
        frozen.sigcont()
    wait_until(lambda: frozen.running and cluster.rows("SELECT 1 FROM byrd.workers HAVING count(*) = 2"))
    check_database(cluster.database_url)
