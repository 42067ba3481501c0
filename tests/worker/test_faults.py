"""Real faults in the middle of real work: nothing is lost, nothing is recorded twice."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from celery import chain, group

from byrd.embedded import EmbeddedPostgres, EmbeddedValkey
from byrd.engine import Run
from byrd.model import PROTOCOL_VERSION
from tests.cluster import Cluster, ClusterFactory, wait_until
from tests.invariants import check_database
from tests.reliability.test_messages import only_message

APP = "tests.apps.basic"
RUNS = 200


def work(app: Any, log: Path) -> Any:
    """A canvas with each way of going on: a chain, a group, a chord."""
    return chain(app.add.s(1, 1), app.add.s(1), group(app.add.s(n) for n in range(3)), app.total.s(), app.linger.s())


def submit_all(app: Any, tmp_path: Path, count: int = RUNS) -> list[Run]:
    """Submit all at once: one by one, they would be finished as they come."""
    return list(app.engine.submit_many([work(app, tmp_path) for _ in range(count)]))


def finished(cluster: Cluster) -> int:
    return int(cluster.rows("SELECT count(*) FROM byrd.runs WHERE finished_at IS NOT NULL")[0][0])


def check_all(cluster: Cluster, runs: list[Run], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    for run in runs:
        assert run.get(timeout=max(1.0, deadline - time.monotonic())) == 12, run.why()
        assert run.wait(timeout=10) == "succeeded"
    check_database(cluster.database_url)


def test_a_worker_killed_in_the_middle_of_200_runs(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    doomed, _ = cluster.worker(APP), cluster.worker(APP)
    runs = submit_all(app, tmp_path)
    wait_until(lambda: finished(cluster) > RUNS // 10)
    doomed.kill()
    assert finished(cluster) < RUNS
    check_all(cluster, runs)


def test_redis_flushed_in_the_middle_of_200_runs(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    cluster.worker(APP)
    runs = submit_all(app, tmp_path)
    wait_until(lambda: finished(cluster) > RUNS // 10)
    with cluster.redis() as client:
        client.flushall()
    assert finished(cluster) < RUNS
    check_all(cluster, runs)


def test_all_workers_killed_and_redis_flushed(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    workers = [cluster.worker(APP), cluster.worker(APP)]
    runs = submit_all(app, tmp_path, 60)
    wait_until(lambda: finished(cluster) > 5)
    for worker in workers:
        worker.kill()
    with cluster.redis() as client:
        client.flushall()
    cluster.worker(APP)
    check_all(cluster, runs)


@pytest.fixture
def own(cluster_on: ClusterFactory, own_postgres: EmbeddedPostgres, own_broker: EmbeddedValkey) -> Cluster:
    return cluster_on(database_url=own_postgres.url, broker_url=own_broker.url)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_redis_goes_away_while_workers_hold_messages(
    own: Cluster, own_broker: EmbeddedValkey, tmp_path: Path, pool: str
) -> None:
    app = own.app(APP)
    worker = own.worker(APP, pool=pool)
    go = tmp_path / "go"
    held = [app.engine.submit(app.wait_for_file.s(str(go), n) | app.add.s(1)) for n in range(4)]
    wait_until(lambda: own.rows("SELECT 1 FROM byrd.steps WHERE status = 'running'"))
    own_broker.kill()
    late = app.engine.submit(app.add.s(1, 1))  # submitting needs no broker
    go.touch()
    wait_until(lambda: held[0].steps()[0].status == "succeeded")
    own_broker.start()
    assert [run.get(timeout=60) for run in held] == [1, 2, 3, 4]
    assert late.get(timeout=60) == 2
    assert worker.running
    check_database(own.database_url)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_postgres_restarts_under_load(own: Cluster, own_postgres: EmbeddedPostgres, tmp_path: Path, mode: Any) -> None:
    app = own.app(APP)
    worker = own.worker(APP)
    runs = submit_all(app, tmp_path, 60)
    wait_until(lambda: finished(own) > 5)
    own_postgres.restart(mode=mode)
    check_all(own, runs)
    assert worker.running
    # A restart alone makes no worker dead: nothing was taken away from one that lives.
    assert own.rows("SELECT count(*) FROM byrd.steps WHERE preemptions > 0") == [(0,)]


def test_a_frozen_worker_wakes_up_as_a_zombie(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    zombie = cluster.worker(APP, concurrency=1)
    go = tmp_path / "go"
    run = app.engine.submit(app.wait_for_file.s(str(go), 5) | app.add.s(1))
    wait_until(lambda: run.steps()[0].status == "running")
    zombie.sigstop()
    try:
        cluster.worker(APP, concurrency=1)
        wait_until(lambda: run.steps()[0].attempt == 2, timeout=60)
    finally:
        zombie.sigcont()
    go.touch()
    assert run.get(timeout=30) == 6
    zombie.wait_for_log("attempt 1 (may not write|does not own|stopped)", timeout=30)
    assert zombie.running
    [first, _] = run.steps()
    assert (first.attempt, first.preemptions) == (2, 1)
    check_database(cluster.database_url)


def test_a_duplicated_message_finds_nothing(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(app.note.s(str(path), "once"))
    with cluster.redis() as client:
        [message] = client.lrange("celery", 0, -1)
        for _ in range(5):
            client.lpush("celery", message)
    worker = cluster.worker(APP)
    assert run.get(timeout=30) == "once"
    wait_until(lambda: _empty(cluster))
    worker.stop()
    assert path.read_text() == "once\n"


def test_a_forged_message_runs_nothing(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    path = tmp_path / "notes"
    run = app.engine.submit(app.note.s(str(path), "real"))
    [step] = run.steps()
    true = {"v": PROTOCOL_VERSION, "run": run.id, "step": step.id, "no": 0, "attempt": 0}
    forged = {
        "step nothing like it is not ready": {**true, "step": "nothing like it"},
        "a message of protocol version 99": {**true, "v": 99},
    }
    with only_message(cluster, run):  # it is due, and would run if any of them were taken for that message
        worker = cluster.worker(APP)
        for why, header in forged.items():
            app.note.apply_async((str(path), "forged"), headers={"byrd": header})
            worker.wait_for_log(why)
        assert run.steps()[0].attempt == 0
        assert not path.exists()
        app.note.apply_async((str(path), "forged"), headers={"byrd": true})
        assert run.get(timeout=30) == "real"
    worker.stop()
    assert path.read_text() == "real\n"


def test_a_worker_without_byrd_runs_no_step(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    stranger = cluster.worker("tests.apps.stranger")
    path = tmp_path / "notes"
    run = app.engine.submit(app.note.s(str(path), "mine"))
    stranger.wait_for_log("keyword arguments is not a mapping")
    assert not path.exists()
    stranger.kill()
    cluster.worker(APP)
    assert run.get(timeout=60) == "mine"


def test_killed_between_commit_and_publish(cluster: Cluster, tmp_path: Path) -> None:
    """The ready row is the outbox: what was never sent is sent by the relay."""
    app = cluster.app(APP)
    run = app.engine.submit(app.add.s(1, 2))
    with cluster.redis() as client:
        client.flushall()  # as if the submitter had died before it published
    cluster.worker(APP)
    assert run.get(timeout=30) == 3
    assert run.steps()[0].sends == 2


def test_the_relay_does_not_flood_a_queue_that_nobody_consumes(cluster: Cluster) -> None:
    app = cluster.app(APP)
    runs = [app.engine.submit(app.add.s(1, 2).set(queue="nobody")) for _ in range(50)]
    worker = cluster.worker(APP)
    seen = time.monotonic()
    wait_until(lambda: time.monotonic() - seen > 8, timeout=20)
    assert "lost its messages" not in worker.log_text()  # a broker that nobody has asked before is no broken one
    with cluster.redis() as client:
        assert 0 < client.llen("nobody") <= 20  # enough for whoever comes
    cluster.worker(APP, queues=["nobody"])
    assert [run.get(timeout=30) for run in runs] == [3] * 50


def test_a_long_line_stays_a_line(cluster: Cluster, tmp_path: Path) -> None:
    """What waits for its turn gets no message of its own, however long: that would stand behind all in the queue."""
    app = cluster.app(APP)
    cluster.worker(APP)
    go = tmp_path / "go"
    busy = [app.engine.submit(app.wait_for_file.s(str(go), n)) for n in (1, 2)]
    wait_until(lambda: all(run.steps()[0].status == "running" for run in busy))
    runs = [app.engine.submit(app.add.s(n, 1)) for n in range(60)]
    cluster.rows(
        """UPDATE byrd.steps SET ready_at = ready_at - interval '1 min', wake_at = wake_at - interval '1 min'
           WHERE status = 'ready' RETURNING 1"""
    )
    seen = time.monotonic()
    wait_until(lambda: time.monotonic() - seen > 5, timeout=20)
    assert not cluster.rows("SELECT 1 FROM byrd.steps WHERE status = 'ready' AND solo")
    with cluster.redis() as client:
        assert client.llen("celery") <= 20
        client.delete("celery")  # a second fault: nothing tells of it but that they are overdue
    go.touch()
    assert [run.get(timeout=30) for run in [*busy, *runs]] == [1, 2, *range(1, 61)]
    assert max(step.sends for run in runs for step in run.steps()) <= 4


def test_submitters_in_many_threads(cluster: Cluster) -> None:
    app = cluster.app(APP)
    cluster.worker(APP)
    found: list[Any] = []

    def submit() -> None:
        found.extend(app.engine.submit(app.add.s(n, 1) | app.add.s(1)).get(timeout=60) for n in range(10))

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(n + 2 for n in range(10) for _ in range(8))


def _empty(cluster: Cluster) -> bool:
    with cluster.redis() as client:
        return int(client.llen("celery")) == 0


def test_a_soft_shutdown_gives_back_what_takes_too_long(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    go = tmp_path / "go"
    env = {"REMAP_SIGTERM": "SIGQUIT", "SOFT_SHUTDOWN": "1"}
    worker = cluster.worker(APP, concurrency=1, env=env)
    run = app.engine.submit(app.wait_for_file.s(str(go), 1) | app.add.s(1))
    wait_until(lambda: run.steps()[0].status == "running")
    worker.stop(timeout=30)
    [step, _] = run.steps()
    assert (step.status, step.preemptions) == ("ready", 0)
    go.touch()
    cluster.worker(APP, concurrency=1)
    assert run.get(timeout=30) == 2


def test_an_outcome_that_postgres_refuses_for_a_while(cluster: Cluster, tmp_path: Path) -> None:
    app = cluster.app(APP)
    cluster.worker(APP)
    go = tmp_path / "go"
    run = app.engine.submit(app.wait_for_file.s(str(go), 5) | app.add.s(1))
    wait_until(lambda: run.steps()[0].status == "running")
    cluster.rows("""
        CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
          $$ BEGIN RAISE EXCEPTION 'disk full' USING ERRCODE = '53100'; END $$;
        CREATE TRIGGER full_disk BEFORE UPDATE ON byrd.steps FOR EACH ROW
          WHEN (NEW.status IN ('succeeded', 'failed')) EXECUTE FUNCTION full_disk()""")
    go.touch()
    cluster.workers[0].wait_for_log("disk full")
    cluster.rows("DROP TRIGGER full_disk ON byrd.steps")
    assert run.get(timeout=30) == 6


def test_lost_wake_ups_are_sent_again_though_the_queue_is_full_of_others(cluster: Cluster) -> None:
    app = cluster.app(APP)
    run = app.engine.submit(app.add.s(1, 2).set(queue="shared"))
    with cluster.redis() as client:
        client.flushall()
    for _ in range(20):
        app.echo.apply_async((1,), queue="shared")  # a backlog that nobody works off
    cluster.worker(APP)  # relays, but consumes another queue
    wait_until(lambda: run.steps()[0].sends > 1, timeout=40)
    cluster.worker(APP, queues=["shared"])
    assert run.get(timeout=30) == 3


def test_deadlines_hold_while_the_broker_is_away(own: Cluster, own_broker: EmbeddedValkey) -> None:
    app = own.app(APP)
    worker = own.worker(APP)
    run = app.engine.submit(app.add.s(1, 1).set(countdown=600), timeout=1)
    late = app.engine.submit(app.add.s(1, 1).set(countdown=0.5))
    own_broker.kill()
    assert run.wait(timeout=40) == "failed"
    own_broker.start()
    assert late.get(timeout=60) == 2
    assert worker.running


def test_a_revoke_while_postgres_is_away(own: Cluster, own_postgres: EmbeddedPostgres) -> None:
    app = own.app(APP)
    with own.redis() as client:
        first = app.engine.submit(app.add.s(1, 1))
        [before] = first.steps()
        [message] = client.lrange("celery", 0, -1)
        worker = own.worker(APP, concurrency=1)
        assert first.get(timeout=30) == 2
        run = app.engine.submit(app.add.s(1, 1).set(countdown=3))
        [step] = run.steps()
        app.app.control.revoke(step.id, reply=True, timeout=5)
        own_postgres.stop()
        client.lpush("celery", message.replace(before.id.encode(), step.id.encode()))
        worker.wait_for_log("Discarding revoked task")
    own_postgres.start()
    assert run.wait(timeout=60) == "failed"
    assert worker.running
