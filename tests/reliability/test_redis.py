"""Redis is only the pipe: emptied, full, frozen, demoted or gone, it costs time and nothing else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from byrd import embedded
from byrd.embedded import EmbeddedValkey
from byrd.store.sweeps import PATIENCE_SECONDS
from byrd.worker import Settings, Sweeper
from tests.cluster import Cluster, ClusterFactory, wait_until
from tests.invariants import check_database
from tests.reliability.outages import APP, BOUND_SECONDS, Struck, alive, log, measured, no_preemption, starts_after
from tests.reliability.proxy import Proxy

OUTAGE_SECONDS = 30.0


@pytest.fixture
def own(cluster_on: ClusterFactory, database_url: str, own_broker: EmbeddedValkey) -> Cluster:
    """A cluster whose Redis belongs to the test."""
    return cluster_on(database_url=database_url, broker_url=own_broker.url)


def test_flushed_in_mid_work(own: Cluster, tmp_path: Path) -> None:
    worker = own.worker(APP)
    struck = Struck(own, tmp_path / "go", own_messages=True)
    with own.redis() as client:
        assert client.llen("celery") > 1  # of a step that a worker holds, it may have a second one
        client.flushall()
    flushed = time.time()
    # One that has waited for minutes: it was sent again and again, at ever longer intervals, for it needs its message.
    own.rows(
        "UPDATE byrd.steps SET sends = 9, solo = true, wake_at = now() + interval '1 minute' WHERE run_id = %s",
        struck.queued[0].id,
    )
    struck.finish()
    struck.check()
    worker.wait_for_log("the broker has lost its messages")
    assert max(starts_after(own, flushed, struck.queued)) < BOUND_SECONDS
    assert measured("Redis flushed", own, flushed, struck.queued) < BOUND_SECONDS
    no_preemption(own)
    alive(worker)


def test_one_message_is_lost_of_a_queue_that_stays_full(own: Cluster, tmp_path: Path) -> None:
    """Its step needs it, and it alone is sent again, though the queue does not look as if anything were missing."""
    app, go = own.app(APP), tmp_path / "go"
    own.worker(APP)
    busy = [app.engine.submit(app.wait_for_file.s(str(go), n)) for n in (1, 2)]
    wait_until(lambda: all(run.steps()[0].status == "running" for run in busy))
    runs = [app.engine.submit(app.add.s(n, 1).set(time_limit=60)) for n in range(40)]
    with own.redis() as client:
        for _ in range(40):
            client.lpush("celery", "{}")  # of others
        messages = client.lrange("celery", 0, -1)
        lost = [message for message in messages if runs[-1].steps()[0].id.encode() in message]
        assert client.lrem("celery", 1, lost[0]) == 1
        dropped = time.time()
        wait_until(lambda: runs[-1].steps()[0].sends == 2, timeout=15, what="its message to be sent again")
        log.info("the one message that was lost was sent again after %.1f s", time.time() - dropped)
        there = b"".join(client.lrange("celery", 0, -1))
        client.delete("celery")
    held = [step for run in runs[:-1] for step in run.steps() if step.id.encode() in there]
    assert len(held) > 20
    assert {step.sends for step in held} == {1}
    go.touch()
    assert [run.get(timeout=60) for run in [*busy, *runs]] == [1, 2, *range(1, 41)]
    check_database(own.database_url)


def test_what_a_redis_refuses_for_long_is_not_taken_for_sent(own: Cluster) -> None:
    """Redis still tells what is in its queues, so the relay tries again and again; each time it could not send."""
    app = own.app(APP)
    alone, shared = app.engine.submit(app.add.s(1, 1).set(time_limit=60)), app.engine.submit(app.add.s(2, 2))
    sweeper = Sweeper(app.engine.runtime, Settings(sweep_seconds=0.1))
    try:
        sweeper.relay()
        with own.redis() as client:
            client.delete("celery")
            fill(client)
            for _ in range(8):
                own.rows("UPDATE byrd.steps SET wake_at = now() - interval '1 s' RETURNING 1")
                time.sleep(0.15)
                sweeper.relay()
            assert [(step.sends, step.status) for run in (alone, shared) for step in run.steps()] == [(1, "ready")] * 2
            [(pause,)] = own.rows("SELECT max(wake_at - now()) FROM byrd.steps")
            assert pause.total_seconds() <= 2.1
            client.delete("junk")

            def both_sent() -> bool:  # somebody may be woken twice for the one while the other is not due yet
                sweeper.relay()
                return all(step.sends > 1 for run in (alone, shared) for step in run.steps())

            wait_until(both_sent, timeout=15, what="both to be sent again")
            assert client.llen("celery") >= 2
    finally:
        sweeper.stop()
    own.worker(APP)
    assert [run.get(timeout=30) for run in (alone, shared)] == [2, 4]
    check_database(own.database_url)


@pytest.mark.parametrize("bindings", [False, True], ids=["queue", "queue and bindings"])
def test_a_queue_that_is_evicted(own: Cluster, tmp_path: Path, *, bindings: bool) -> None:
    """A Redis that evicts may take the queue's list and leave the relay's mark, so that nothing tells of it."""
    worker = own.worker(APP)
    struck = Struck(own, tmp_path / "go", own_messages=True)
    with own.redis() as client:
        [mark] = wait_until(lambda: client.keys("byrd.relay.*"))
        assert client.llen("celery") > 1  # of a step that a worker holds, it may have a second one
        client.delete("celery", *client.keys("_kombu.binding.*") if bindings else ())
        evicted = time.time()
        struck.finish()
        struck.check()
        assert client.exists(mark)
    assert "the broker has lost its messages" not in worker.log_text()
    measured("Redis evicted a queue", own, evicted, struck.queued)
    assert starts_after(own, evicted, struck.queued)[1] < PATIENCE_SECONDS
    no_preemption(own)
    alive(worker)


def test_restarted_without_persistence(cluster_on: ClusterFactory, database_url: str, tmp_path: Path) -> None:
    with embedded.valkey(persistence=False) as server:
        own = cluster_on(database_url=database_url, broker_url=server.url)
        worker = own.worker(APP)
        struck = Struck(own, tmp_path / "go", own_messages=True)
        server.kill()
        server.start()
        answers = time.time()
        struck.finish()
        struck.check()
        assert measured("Redis restarted empty", own, answers, struck.queued) < BOUND_SECONDS
        no_preemption(own)
        alive(worker)


def test_30_seconds_without_redis(own: Cluster, own_broker: EmbeddedValkey, tmp_path: Path) -> None:
    """Steps end meanwhile, each kind of pool outlives it, and consumes again soon after it."""
    pools = ("prefork", "threads", "solo")
    workers = [own.worker(APP, pool=pool, queues=[pool], wait=False) for pool in pools]
    for worker in workers:
        worker.wait_for_log(r" ready\.", timeout=60)
    struck = [Struck(own, tmp_path / pool, held=1, queued=3, queue=pool) for pool in pools]
    own_broker.kill()
    gone = time.monotonic()
    for each in struck:
        each.finish()
    for each in struck:
        wait_until(lambda each=each: each.held[0].steps()[0].status == "succeeded")  # type: ignore[misc]
    late = own.app(APP).engine.submit(own.app(APP).add.s(1, 1).set(queue="solo"))  # submitting needs no broker
    wait_until(lambda: time.monotonic() - gone > OUTAGE_SECONDS, timeout=OUTAGE_SECONDS + 10)
    alive(*workers)
    own_broker.start()
    answers = time.time()
    for each in struck:
        each.check()
    assert late.get(timeout=30) == 2
    # Prefork and solo need no broker for what was ready: a process that is awake takes it.
    threads = struck[pools.index("threads")]
    runs = [*threads.held, *threads.queued]
    assert measured("Redis away for 30 s (threads)", own, answers, runs) < BOUND_SECONDS
    no_preemption(own)
    alive(*workers)


def test_out_of_memory(own: Cluster, tmp_path: Path) -> None:
    """With ``noeviction`` a full Redis refuses every write: publishing, and taking a message too."""
    app = own.app(APP)
    worker = own.worker(APP)
    struck = Struck(own, tmp_path / "go")
    with own.redis() as client:
        fill(client)
        # With a time limit each needs a message of its own; else they would be done without one.
        refused = [app.engine.submit(app.add.s(n, 1).set(time_limit=60)) for n in range(5)]
        struck.finish()
        wait_until(lambda: all(run.steps()[0].status == "succeeded" for run in struck.held))
        worker.wait_for_log("the broker does not take wake-ups now.*OutOfMemory")
        alive(worker)
        client.delete("junk")
        freed = time.time()
    struck.check()
    assert [run.get(timeout=60) for run in refused] == [1, 2, 3, 4, 5]
    assert measured("Redis out of memory", own, freed) < BOUND_SECONDS
    no_preemption(own)
    alive(worker)


def test_frozen_redis_costs_no_lease(own: Cluster, own_broker: EmbeddedValkey, tmp_path: Path) -> None:
    workers = [own.worker(APP, pool=pool, queues=[pool]) for pool in ("prefork", "threads")]
    struck = [Struck(own, tmp_path / pool, held=2, queued=2, queue=pool) for pool in ("prefork", "threads")]
    [(lease,)] = own.rows("SELECT extract(epoch FROM max(lease_until - heartbeat_at)) FROM byrd.workers")
    os.kill(own_broker.pid, signal.SIGSTOP)
    try:
        frozen = time.monotonic()
        for each in struck:
            each.finish()  # and so there is something to publish, which hangs
        wait_until(lambda: time.monotonic() - frozen > 4 * float(lease), timeout=60)
        assert own.rows("SELECT count(*) FROM byrd.workers WHERE lease_until > clock_timestamp()") == [(2,)]
        for each in struck:
            wait_until(lambda each=each: all(run.steps()[0].status == "succeeded" for run in each.held))  # type: ignore[misc]
        app = own.app(APP)
        late = app.engine.submit(app.add.s(1, 1), timeout=1)
        assert late.wait(timeout=60) == "failed"  # deadlines hold though the relay hangs
    finally:
        os.kill(own_broker.pid, signal.SIGCONT)
    answers = time.time()
    for each in struck:
        each.check()
    assert measured("Redis frozen", own, answers) < BOUND_SECONDS
    no_preemption(own)
    alive(*workers)


@pytest.fixture
def replica(own_broker: EmbeddedValkey) -> Iterator[EmbeddedValkey]:
    """A replica of the test's Redis."""
    with embedded.valkey(persistence=False) as server:
        yield server


def test_failover_to_an_empty_replica(
    cluster_on: ClusterFactory, database_url: str, own_broker: EmbeddedValkey, replica: EmbeddedValkey, tmp_path: Path
) -> None:
    """Replication is asynchronous: this replica's link broke before there was anything to copy, then it took over."""
    with Proxy(own_broker.port) as address, Proxy(own_broker.port) as link:
        follow(replica, link.port)
        link.cut()
        own = cluster_on(database_url=database_url, broker_url=f"redis://127.0.0.1:{address.port}/0")
        worker = own.worker(APP)
        struck = Struck(own, tmp_path / "go", own_messages=True)
        own_broker.kill()
        with redis.Redis.from_url(replica.url) as client:
            client.replicaof("NO", "ONE")
            assert client.dbsize() == 0
        address.lead_to(replica.port)
        answers = time.time()
        struck.finish()
        struck.check()
        assert measured("Redis failed over to an empty replica", own, answers, struck.queued) < BOUND_SECONDS
        no_preemption(own)
        alive(worker)


def test_demoted_to_a_read_only_replica(
    own: Cluster, own_broker: EmbeddedValkey, replica: EmbeddedValkey, tmp_path: Path
) -> None:
    """Each write is answered with READONLY until the clients' address leads to a primary again."""
    worker = own.worker(APP)
    struck = Struck(own, tmp_path / "go")
    follow(own_broker, replica.port)
    struck.finish()
    wait_until(lambda: all(run.steps()[0].status == "succeeded" for run in struck.held))
    worker.wait_for_log("READONLY|read only replica")
    alive(worker)
    with redis.Redis.from_url(own_broker.url) as client:
        client.replicaof("NO", "ONE")
    answers = time.time()
    struck.check()
    assert measured("Redis demoted and promoted again", own, answers) < BOUND_SECONDS
    no_preemption(own)
    alive(worker)


def fill(client: redis.Redis) -> None:
    """Have Redis hold more than it may, by far more than its messages are."""
    for _ in range(100):
        client.rpush("junk", "x" * 50_000)
    client.config_set("maxmemory", int(client.info("memory")["used_memory"]) - 2_000_000)
    with pytest.raises(redis.OutOfMemoryError):
        client.set("more", "x")


def follow(server: EmbeddedValkey, primary_port: int) -> None:
    """Make a server the replica of another, and wait until it has its data."""
    with redis.Redis.from_url(server.url) as client:
        client.replicaof("127.0.0.1", primary_port)
        wait_until(lambda: client.info("replication")["master_link_status"] == "up")
