"""A worker that is cut off from Postgres, from Redis, or from both: its packets vanish without a word."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import group

from byrd.embedded import EmbeddedPostgres, EmbeddedValkey
from tests.cluster import Cluster, ClusterFactory, wait_until
from tests.invariants import check_database
from tests.reliability.namespaces import CutOff, Link, cut_off, why_not
from tests.reliability.outages import APP, BOUND_SECONDS, alive, log, measured, no_preemption

#: Longer than the lease of these workers (3 s), and than it takes to notice that a connection is dead (10 s).
CUT_SECONDS = 30.0


@pytest.fixture
def far(own_postgres: EmbeddedPostgres, own_broker: EmbeddedValkey) -> Iterator[CutOff]:
    """A network from which this test's servers can be reached."""
    if reason := why_not():
        pytest.skip(reason)
    with cut_off(own_postgres, own_broker) as found:
        yield found


@pytest.fixture
def own(cluster_on: ClusterFactory, own_postgres: EmbeddedPostgres, own_broker: EmbeddedValkey) -> Cluster:
    """A cluster on this test's servers."""
    return cluster_on(database_url=own_postgres.url, broker_url=own_broker.url)


def lives(cluster: Cluster, hostname: str) -> bool:
    """Tell whether the worker has a lease."""
    sql = "SELECT 1 FROM byrd.workers WHERE hostname = %s AND lease_until > clock_timestamp()"
    return bool(cluster.rows(sql, hostname))


def sleep_out(seconds: float, since: float) -> None:
    """An outage lasts so long: there is nothing else to wait for."""
    wait_until(lambda: time.monotonic() - since > seconds, timeout=seconds + 30)


@pytest.mark.parametrize("links", [("postgres",), ("postgres", "redis")], ids=["postgres", "both"])
def test_cut_off_for_longer_than_the_lease(own: Cluster, far: CutOff, tmp_path: Path, links: tuple[Link, ...]) -> None:
    """Others do its work; when the link is back it can record nothing of what it had, and works on by itself."""
    app = own.app(APP)
    go = tmp_path / "go"
    worker = far.worker(own, APP)
    runs = [app.engine.submit(app.wait_for_file.s(str(go), n) | app.add.s(1)) for n in (1, 2)]
    wait_until(lambda: all(run.steps()[0].status == "running" for run in runs))
    far.cut(*links)
    cut = time.monotonic()
    own.worker(APP)
    wait_until(lambda: all(run.steps()[0].attempt == 2 for run in runs), timeout=60)
    log.info("cut off from %s: others run its steps %.1f s after the cut", links, time.monotonic() - cut)
    go.touch()  # both have done the work now: the one that is cut off cannot say so
    assert [run.get(timeout=60) for run in runs] == [2, 3]
    sleep_out(CUT_SECONDS, cut)
    own.workers[-1].stop()
    assert not lives(own, worker.hostname)
    late = app.engine.submit(app.add.s(1, 1))
    far.mend(*links)
    mended = time.time()
    worker.wait_for_log("attempt 1 (may not write|does not own|stopped)", timeout=60)
    assert late.get(timeout=60) == 2
    assert measured(f"cut off from {' and '.join(links)}", own, mended) < BOUND_SECONDS
    wait_until(lambda: lives(own, worker.hostname))
    alive(worker)
    assert [[step.attempt for step in run.steps()] for run in runs] == [[2, 1], [2, 1]]
    check_database(own.database_url)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_cut_off_from_redis_only(own: Cluster, far: CutOff, tmp_path: Path, pool: str) -> None:
    """It keeps its lease and records what it has done; it takes new work when the link is back."""
    app = own.app(APP)
    go = tmp_path / "go"
    worker = far.worker(own, APP, pool=pool)
    # One of its two hands is free, so it waits for a message when the link is cut.
    canvas = app.wait_for_file.s(str(go), 1) | group(app.add.s(n) for n in range(20)) | app.total.s()
    run = app.engine.submit(canvas)
    wait_until(lambda: run.steps()[0].status == "running")
    far.cut("redis")
    cut = time.monotonic()
    go.touch()
    wait_until(lambda: run.steps()[0].status == "succeeded")
    worker.wait_for_log("wait_for_file.* succeeded in")  # it has not waited for the broker once per wake-up
    sleep_out(CUT_SECONDS, cut)
    assert lives(own, worker.hostname)
    far.mend("redis")
    mended = time.time()
    assert run.get(timeout=120) == 210
    assert measured(f"cut off from redis ({pool})", own, mended) < BOUND_SECONDS
    no_preemption(own)
    alive(worker)
    check_database(own.database_url)
