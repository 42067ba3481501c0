"""The ways in which plain Celery on Redis loses or repeats work, each tried on a step: it runs once, and is not lost.

The app under test has the settings under which plain Celery repeats most: late acks, and a visibility time-out of two
seconds in place of an hour.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import redis
from celery import chain, chord
from celery.backends.database import DatabaseBackend
from celery.exceptions import TaskRevokedError

from byrd.embedded import EmbeddedValkey
from byrd.engine import Run
from byrd.store import sweeps
from tests.cluster import Cluster, ClusterFactory, wait_until
from tests.invariants import check_database

APP = "tests.apps.delivery"
POOLS = ["prefork", "threads", "solo"]


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_running(run: Run, no: int = 0) -> None:
    wait_until(lambda: run.steps()[no].status == "running", what=lambda: f"a running step: {run.why()}")


def attempts(cluster: Cluster) -> set[int]:
    """Return how often steps were started: {1} when none was started twice."""
    return {row[0] for row in cluster.rows("SELECT attempt FROM byrd.steps WHERE task IS NOT NULL")}


def messages_in(cluster: Cluster, *keys: str) -> int:
    """Return how many messages the broker holds in these hashes and lists."""
    with cluster.redis() as client:
        return sum(int(client.hlen(key) if key == "unacked" else client.llen(key)) for key in keys)


# ------------------------------------------------------------------------------------------------- visibility time-out


@pytest.mark.parametrize("pool", POOLS)
def test_a_step_longer_than_the_visibility_timeout_runs_once(cluster: Cluster, tmp_path: Path, pool: str) -> None:
    """Plain Celery starts such a task again each two seconds, for ever."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    cluster.worker(APP, pool=pool, concurrency=1 if pool == "solo" else 2)
    run = app.engine.submit(chain(app.note.s(str(notes), "long", 14.0), app.note.si(str(notes), "after")))
    wait_running(run)
    if pool != "solo":
        assert messages_in(cluster, "unacked") == 0  # acknowledged once a pool process has it
    assert run.get(timeout=90) == "after"
    assert lines(notes) == ["long", "after"]
    assert attempts(cluster) == {1}
    check_database(cluster.database_url)


@pytest.mark.parametrize("pool", POOLS)
def test_an_eta_beyond_the_visibility_timeout_runs_once(cluster: Cluster, tmp_path: Path, pool: str) -> None:
    """Plain Celery delivers such a message again and again: a dozen seconds were six executions."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    cluster.worker(APP, pool=pool)
    began = time.monotonic()
    run = app.engine.submit(app.note.s(str(notes), "later").set(countdown=13))
    assert messages_in(cluster, "celery", "unacked") == 0  # it waits in Postgres
    assert run.get(timeout=90) == "later"
    assert time.monotonic() - began > 12.5
    assert lines(notes) == ["later"]
    assert attempts(cluster) == {1}
    check_database(cluster.database_url)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_messages_that_a_frozen_worker_holds_are_restored_and_its_late_acks_harm_nothing(
    cluster: Cluster, tmp_path: Path, pool: str
) -> None:
    """The restored message keeps its delivery tag, so the zombie's ack removes the one that another worker has."""
    app, notes, go = cluster.app(APP), tmp_path / "notes", tmp_path / "go"
    zombie = cluster.worker(APP, pool=pool, concurrency=1, env={"TEST_PREFETCH": "4"})
    blocking = app.engine.submit(app.wait_for_file.s(str(go), "free"))
    wait_running(blocking)
    runs = [app.engine.submit(app.note.s(str(notes), n) | app.add.s(1)) for n in range(3)]
    wait_until(lambda: messages_in(cluster, "unacked") >= 3, what="messages in the worker's hands")
    zombie.sigstop()
    try:
        cluster.worker(APP, concurrency=2)
        assert [run.get(timeout=90) for run in runs] == [1, 2, 3]
        wait_until(lambda: blocking.steps()[0].attempt == 2, timeout=60)
    finally:
        zombie.sigcont()
    go.touch()
    assert blocking.get(timeout=60) == "free"
    more = [app.engine.submit(app.note.s(str(notes), n) | app.add.s(1)) for n in range(10, 20)]
    assert [run.get(timeout=60) for run in more] == list(range(11, 21))
    assert Counter(lines(notes)) == Counter(map(str, [*range(3), *range(10, 20)]))
    assert zombie.running
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- connections


@pytest.mark.parametrize("cancel", [False, True], ids=["keeping tasks", "cancelling tasks"])
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_dropped_connection_starts_nothing_twice(
    cluster: Cluster, tmp_path: Path, pool: str, *, cancel: bool
) -> None:
    """Plain Celery restores what the worker holds at once, and runs it twice at the same time.

    With ``worker_cancel_long_running_tasks_on_connection_loss`` Celery ends the pool process; then the step is begun
    again, which its history says, and never twice at once.
    """
    app, notes, go = cluster.app(APP), tmp_path / "notes", tmp_path / "go"
    worker = cluster.worker(APP, pool=pool, env={"TEST_CANCEL": "1" if cancel else ""})
    held = app.engine.submit(chain(app.wait_for_file.s(str(go), "x"), app.note.si(str(notes), "after")))
    wait_running(held)
    with cluster.redis() as client:
        client.client_kill_filter(_type="normal", skipme=True)
        client.client_kill_filter(_type="pubsub", skipme=True)
    runs = [app.engine.submit(app.note.s(str(notes), n)) for n in range(5)]
    assert [run.get(timeout=60) for run in runs] == list(range(5))
    worker.wait_for_log("Connection to broker lost|connection: Connection to broker lost|Trying to re-establish")
    go.touch()
    assert held.get(timeout=60) == "after"
    assert Counter(lines(notes)) == Counter(["after", *map(str, range(5))])
    first = held.steps()[0]
    ends = [row[0] for row in cluster.rows("SELECT outcome FROM byrd.attempts WHERE step_id = %s", first.id)]
    assert len(ends) == first.attempt - 1  # each attempt but the last ended before the next began
    if not cancel:
        assert first.attempt == 1
    assert worker.running
    check_database(cluster.database_url)


@pytest.fixture
def own(cluster_on: ClusterFactory, database_url: str, own_broker: EmbeddedValkey) -> Cluster:
    return cluster_on(database_url=database_url, broker_url=own_broker.url)


@contextmanager
def frozen(server: EmbeddedValkey) -> Iterator[None]:
    """Stop the server's process without closing its connections: nobody is refused, nobody is answered."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_publish_into_a_frozen_redis_returns_and_its_duplicates_run_once(
    own: Cluster, own_broker: EmbeddedValkey, tmp_path: Path
) -> None:
    """Plain Celery's publisher blocks for ever, or with time-outs sends again what Redis had already got."""
    app, notes = own.app(APP), tmp_path / "notes"
    # With a time limit each needs a message of its own.
    before, late = (app.note.s(str(notes), text).set(time_limit=60) for text in ("before", "frozen"))
    assert app.engine.submit(before).steps()[0].sends == 1  # its connection is open
    with frozen(own_broker):
        began = time.monotonic()
        run = app.engine.submit(late)
        took = time.monotonic() - began
    assert took < 15  # the time-out of its connection is 5 s
    # The publisher was told that it had failed, and Redis has got it.  Whoever does not look there sends it again.
    wait_until(lambda: messages_in(own, "celery") == 2, what="the message whose publisher gave it up")
    store, publisher = app.engine.runtime.store, app.engine.runtime.publisher
    store.run(sweeps.doubt_all)
    again = store.run(sweeps.take_overdue, "celery", resend=2)
    wait_until(lambda: publisher.publish(again), what="a publisher that tries again, a second after a failure")
    assert messages_in(own, "celery") == 4
    worker = own.worker(APP)
    assert run.get(timeout=60) == "frozen"
    with own.redis() as client:
        wait_until(lambda: not client.llen("celery"))
    assert app.engine.submit(app.note.s(str(notes), "last")).get(timeout=60) == "last"
    assert Counter(lines(notes)) == Counter(["before", "frozen", "last"])
    assert attempts(own) == {1}
    assert worker.running
    check_database(own.database_url)


def test_a_submit_while_redis_refuses_is_quick(own: Cluster, own_broker: EmbeddedValkey, tmp_path: Path) -> None:
    """kombu would try for six seconds to reach it, each time."""
    app, notes = own.app(APP), tmp_path / "notes"
    own_broker.kill()
    began = time.monotonic()
    run = app.engine.submit(app.note.s(str(notes), "refused"))
    assert time.monotonic() - began < 5
    own_broker.start()
    own.worker(APP)
    assert run.get(timeout=60) == "refused"
    assert lines(notes) == ["refused"]
    check_database(own.database_url)


def test_a_continuation_that_cannot_be_published_does_not_fail_the_step_before_it(
    own: Cluster, own_broker: EmbeddedValkey, tmp_path: Path
) -> None:
    """Plain Celery makes the finished task a FAILURE."""
    app, notes, go = own.app(APP), tmp_path / "notes", tmp_path / "go"
    worker = own.worker(APP)
    # With a time limit it needs a message of its own; else it would be run on in the same process.
    after = app.note.si(str(notes), "after").set(time_limit=60)
    run = app.engine.submit(chain(app.wait_for_file.s(str(go), 1), after))
    wait_running(run)
    own_broker.kill()
    go.touch()
    wait_until(lambda: run.steps()[0].status == "succeeded", timeout=60)
    assert run.steps()[1].status == "ready"
    own_broker.start()
    assert run.get(timeout=60) == "after"
    assert lines(notes) == ["after"]
    assert worker.running
    check_database(own.database_url)


# ------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("acks", ["early", "late"])
@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_killed_with_messages_in_its_hands_loses_none(
    cluster: Cluster, tmp_path: Path, pool: str, acks: str
) -> None:
    """Held, running, taken from the list and not yet noted: whatever the moment, the steps are in Postgres."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    runs: list[Run] = []
    sql = "SELECT 1 FROM byrd.runs WHERE finished_at IS NOT NULL HAVING count(*) > %s"
    for _round in range(2):
        worker = cluster.worker(APP, pool=pool, concurrency=2, env={"TEST_PREFETCH": "8", "TEST_ACKS": acks})
        count = cluster.rows("SELECT count(*) FROM byrd.runs WHERE finished_at IS NOT NULL")[0][0]
        runs += [app.engine.submit(app.note.s(str(notes), "x", 0.01) | app.add.s("y")) for _ in range(60)]
        wait_until(partial(cluster.rows, sql, count + 5))
        worker.kill()
    cluster.worker(APP, env={"TEST_ACKS": acks})
    assert [run.get(timeout=120) for run in runs] == ["xy"] * len(runs)
    check_database(cluster.database_url)


def test_a_kill_while_the_next_step_runs_repeats_that_one_only(cluster: Cluster, tmp_path: Path) -> None:
    """Plain Celery runs both tasks twice.  Kills between each publish and acknowledgement are crash points."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    worker = cluster.worker(APP, pool="solo", concurrency=1)
    run = app.engine.submit(chain(app.note.s(str(notes), "a"), app.note.si(str(notes), "b", 20.0)))
    wait_running(run, 1)  # the solo worker ran on, or took the message: step 0 is recorded in any case
    worker.kill()
    cluster.rows("UPDATE byrd.steps SET args = replace(args, '20.0', '0.0') WHERE run_id = %s AND no = 1", run.id)
    cluster.worker(APP)
    assert run.get(timeout=60) == "b"
    assert lines(notes) == ["a", "b", "b"]  # b was running when its worker died; a had been recorded
    first, second = run.steps()
    assert (first.attempt, second.attempt) == (1, 2)
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- chords


def sent_anew(message: bytes) -> str:
    """Return a message as it is when somebody sends its task again: under another id, with another delivery tag."""
    found = json.loads(message)
    found["headers"]["id"] = found["properties"]["correlation_id"] = str(uuid.uuid4())
    found["properties"]["delivery_tag"] = str(uuid.uuid4())
    return json.dumps(found)


def test_a_chord_whose_header_is_lost_and_sent_twice_joins_once(cluster: Cluster, tmp_path: Path) -> None:
    """Plain Celery's body waits for ever, or, for those under new ids, starts early without one of the parts."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    header = [app.note.s(str(notes), n).set(time_limit=60) for n in range(10)]  # so each needs a message of its own
    run = app.engine.submit(chord(header, app.gather.s()) | app.add.s([99]))
    with cluster.redis() as client:
        found = client.lrange("celery", 0, -1)
        client.delete("celery")
        assert len(found) == 10
        # Three are lost; three come twice, the copies last; three come under another id only.
        for message in (*found[3:7], *map(sent_anew, found[7:]), *map(sent_anew, found[3:6])):
            client.lpush("celery", message)
    worker = cluster.worker(APP)
    assert run.get(timeout=60) == [*range(10), 99]
    with cluster.redis() as client:
        client.lpush("celery", *found, *map(sent_anew, found))
        wait_until(lambda: not client.llen("celery"))
    assert app.engine.submit(app.add.s(1)).get(timeout=60) == 2
    assert run.wait(timeout=30) == "succeeded"
    assert Counter(lines(notes)) == Counter(map(str, range(10)))
    assert attempts(cluster) == {1}
    assert "chord_unlock" not in worker.log_text()
    check_database(cluster.database_url)


def tasks_seen(monitor: redis.client.Monitor, client: redis.Redis) -> set[str]:
    """Return the tasks whose messages the broker got, gave or kept until now, in any of its queues."""
    client.echo("until now")
    found: set[str] = set()
    while "until now" not in (command := monitor.next_command()["command"]):  # type: ignore[no-untyped-call]
        found.update(re.findall(r'"task": "([\w.]+)"', command))
    return found


def test_a_chord_sends_nothing_but_its_steps(own: Cluster) -> None:
    """Plain Celery on a database backend polls with ``celery.chord_unlock`` each second, for ever."""
    app = own.app(APP)
    assert isinstance(app.app.backend, DatabaseBackend)
    worker = own.worker(APP)
    with own.redis() as client, own.redis() as other, other.monitor() as monitor:
        run = app.engine.submit(chord([app.add.s(n) for n in range(5)], app.gather.s()))
        assert run.get(timeout=60) == [1, 2, 3, 4, 5]
        assert run.wait(timeout=30) == "succeeded"
        assert tasks_seen(monitor, client) <= {f"{APP}.add", f"{APP}.gather"}  # the body may run on without a message
        assert "chord_unlock" not in worker.log_text()
        chord([app.add.s(n) for n in range(5)], app.gather.s()).apply_async()  # as Celery does it, on the same worker
        wait_until(lambda: "celery.chord_unlock" in tasks_seen(monitor, client))
        worker.wait_for_log("celery.chord_unlock")


# ------------------------------------------------------------------------------------------------- unknown tasks


def test_a_message_that_a_worker_of_other_code_discards_is_sent_again(cluster: Cluster, tmp_path: Path) -> None:
    """A rolling deploy: the old worker does not know the task, throws the message away, and says so."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    old = cluster.worker("tests.apps.basic")
    run = app.engine.submit(app.note.s(str(notes), "new") | app.add.s("!"))
    old.wait_for_log("unregistered task")
    wait_until(lambda: any("no live worker" in line and "has the task" in line for line in run.why()), timeout=30)
    cluster.worker(APP)
    assert run.get(timeout=60) == "new!"
    assert lines(notes) == ["new"]
    assert run.status == "succeeded"
    assert app.app.AsyncResult(run.steps()[0].id).status == "SUCCESS"
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- revoke


@pytest.mark.parametrize("restart", [False, True], ids=["no worker yet", "before a restart"])
def test_a_revoke_is_kept_though_no_worker_hears_or_remembers_it(
    cluster: Cluster, tmp_path: Path, *, restart: bool
) -> None:
    """In plain Celery it is in the workers' memory only, so these tasks would run.  Here it is in Postgres."""
    app, notes, go = cluster.app(APP), tmp_path / "notes", tmp_path / "go"
    ready = app.engine.submit(app.note.s(str(notes), "ready").set(queue="later") | app.note.si(str(notes), "after"))
    chained = app.engine.submit(
        chain(app.wait_for_file.s(str(go), 1), app.note.si(str(notes), "pending"), app.add.s("!"))
    )
    kept = app.engine.submit(app.note.s(str(notes), "kept").set(queue="later"))
    worker = cluster.worker(APP) if restart else None
    delayed = app.engine.submit(app.note.s(str(notes), "delayed").set(countdown=4))
    ids = [ready.steps()[0].id, delayed.steps()[0].id, chained.steps()[1].id]
    app.app.control.revoke(ids[0])
    app.app.AsyncResult(ids[1]).revoke()
    app.app.control.revoke(ids[1:])
    if worker is not None:
        worker.kill()
    go.touch()
    cluster.worker(APP, queues=["celery", "later"])
    assert [run.wait(timeout=60) for run in (ready, delayed, chained, kept)] == ["failed"] * 3 + ["succeeded"]
    assert lines(notes) == ["kept"]
    with pytest.raises(TaskRevokedError, match="revoked"):
        chained.get(timeout=10)
    assert [app.app.AsyncResult(step_id).status for step_id in ids] == ["REVOKED"] * 3
    chained.retry()  # by an operator who has changed his mind
    assert chained.get(timeout=60) == "pending!"
    check_database(cluster.database_url)


def test_a_revoke_leaves_what_runs_alone(cluster: Cluster, tmp_path: Path) -> None:
    app, go = cluster.app(APP), tmp_path / "go"
    cluster.worker(APP)
    run = app.engine.submit(app.wait_for_file.s(str(go), 1) | app.add.s())
    wait_running(run)
    app.app.control.revoke(run.steps()[0].id)
    app.app.control.revoke("no-such-task")
    go.touch()
    assert run.get(timeout=60) == 2
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- other outages


@pytest.mark.parametrize("acks", ["early", "late"])
def test_a_redis_that_goes_with_the_messages_of_a_worker_that_prefetches(
    own: Cluster, own_broker: EmbeddedValkey, tmp_path: Path, acks: str
) -> None:
    """Eight of twelve tasks were stranded until the visibility time-out in plain Celery, with early acks."""
    app, notes = own.app(APP), tmp_path / "notes"
    worker = own.worker(APP, env={"TEST_PREFETCH": "4", "TEST_ACKS": acks, "TEST_VISIBILITY_SECONDS": "3600"})
    # With a time limit each needs a message of its own.
    runs = [app.engine.submit(app.note.s(str(notes), n, 0.5).set(time_limit=60)) for n in range(12)]
    wait_until(lambda: len(lines(notes)) >= 2 and messages_in(own, "unacked") > 2, what="messages in its hands")
    own_broker.kill()
    own_broker.start()
    assert [run.get(timeout=60) for run in runs] == list(range(12))
    assert Counter(lines(notes)) == Counter(map(str, range(12)))
    assert attempts(own) == {1}
    assert worker.running
    check_database(own.database_url)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_redis_that_goes_ends_no_worker_that_holds_messages(
    own: Cluster, own_broker: EmbeddedValkey, tmp_path: Path, pool: str
) -> None:
    """A worker of Celery 5.7.0 exits with code 1.  Plain tasks, for a step's message is acknowledged at its start."""
    app, notes, go = own.app(APP), tmp_path / "notes", tmp_path / "go"
    worker = own.worker(APP, pool=pool, concurrency=3, env={"TEST_VISIBILITY_SECONDS": "3600"})
    pid = worker.pid
    app.wait_for_file.delay(str(go), "late ack")
    app.note.apply_async((str(notes), "eta"), countdown=3600)
    wait_until(lambda: messages_in(own, "unacked") == 2, what="two messages in the worker's hands")
    own_broker.kill()
    worker.wait_for_log("Connection to broker lost")
    go.touch()
    worker.wait_for_log(f"Task {APP}.wait_for_file.* succeeded")
    own_broker.start()
    assert app.engine.submit(app.note.s(str(notes), "step") | app.add.s("!")).get(timeout=60) == "step!"
    assert (worker.running, worker.pid) == (True, pid), worker.log_tail()
    assert lines(notes) == ["step"]
    check_database(own.database_url)


def test_a_result_backend_that_is_dead_loses_no_result(cluster: Cluster, tmp_path: Path) -> None:
    """In plain Celery the task is acknowledged, the chain goes on, and the result is lost."""
    app, notes = cluster.app(APP), tmp_path / "notes"
    worker = cluster.worker(APP, env={"TEST_RESULTS": "redis://127.0.0.1:1/0"})
    run = app.engine.submit(chain(app.note.s(str(notes), "a"), chord([app.add.s("b"), app.add.s("c")], app.gather.s())))
    assert run.get(timeout=60) == ["ab", "ac"]
    assert run.wait(timeout=30) == "succeeded"
    assert app.app.AsyncResult(run.steps()[0].id).get(timeout=10) == "a"
    assert attempts(cluster) == {1}
    assert worker.running
    check_database(cluster.database_url)
