"""`byrd why` has a clear sentence for each way in which a run can wait, and for each end."""

from __future__ import annotations

import getpass
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import group

from byrd.embedded import EmbeddedPostgres, EmbeddedValkey
from byrd.engine.words import span
from byrd.worker import Settings, Sweeper
from tests.cli.conftest import APP, Cli, cli_on
from tests.cluster import Cluster, ClusterFactory, Worker, wait_until

TIME = r"\d\d:\d\d:\d\d"
SINCE = rf"{TIME} \([^)]+ ago\)"


@pytest.fixture
def shop(cluster: Cluster) -> Any:
    return cluster.app(APP)


def becomes(run: Any, pattern: str, *, timeout: float = 30.0) -> None:
    """Wait until one of the run's reasons matches."""
    wait_until(
        lambda: [reason for reason in run.why() if re.fullmatch(pattern, reason)],
        timeout=timeout,
        what=lambda: f"{pattern}, but: {run.why()}",
    )


def test_without_workers_it_waits_for_one(cluster: Cluster, shop: Any, byrd_cli: Cli) -> None:
    run = shop.engine.submit(shop.price.s(1))
    ready = rf"Step 0 \(tests.cli.shop.price\) is ready since {SINCE}"
    becomes(run, ready + r" but no worker is alive: start one with `celery -A <app> worker`\.")
    many = shop.engine.submit(shop.order(50))
    becomes(many, rf"50 steps of tests.cli.shop.price \(no\. 0 to 49\) are ready since {SINCE} but no worker .*")
    delayed = shop.engine.submit(shop.price.s(1).set(countdown=3600))
    becomes(delayed, r"Step 0 \(.*\) is delayed until .* \(in .*\)\.")
    run.pause()
    becomes(run, rf"It is paused since {SINCE}: nothing more starts until `byrd resume {run.id[:8]}`\.")
    assert byrd_cli("why", run.id).out.startswith("It is paused since")
    late = shop.engine.submit("shop.late", "never")
    becomes(late, rf"Its deadline passed at {SINCE}: a worker, or `byrd relay`, stops it once one is started\.")
    found = byrd_cli("why", many.id, "--json").json
    assert (found["run"], found["status"], len(found["reasons"])) == (many.id, "running", 1)
    run.cancel()
    becomes(run, rf"It was cancelled at {TIME}\.")


def test_a_run_that_nothing_drives_can_be_let_go_on(cluster: Cluster, shop: Any, byrd_cli: Cli) -> None:
    """Such a run is a mistake of Byrd's own; an operator need not wait for its repair."""
    worker = cluster.worker(APP)
    run = shop.engine.submit(shop.price.s(1))
    run.wait(timeout=30)
    worker.stop()
    cluster.rows("UPDATE byrd.runs SET status = 'running', finished_at = NULL WHERE id = %s RETURNING 1", run.id)
    [reason] = run.why()
    assert reason.startswith("None of its steps is ready, running or waiting, which should never be: please report it")
    for command in re.findall(r"`byrd (pause|resume)`", reason):
        byrd_cli(command, run.id)
    assert run.wait(timeout=5) == "succeeded"


def test_it_names_who_gave_a_command(shop: Any, byrd_cli: Cli) -> None:
    run = shop.engine.submit(shop.price.s(1))
    byrd_cli("pause", run.id)
    me = re.escape(f"{getpass.getuser()}@{socket.gethostname()}")
    becomes(run, rf"It is paused since {SINCE}, by {me}: nothing more starts until `byrd resume {run.id[:8]}`\.")
    run.resume(by="the night shift")
    run.pause(by="Anna")
    becomes(run, rf"It is paused since {SINCE}, by Anna: .*")
    run.cancel(by="Bert")
    becomes(run, rf"It was cancelled at {TIME} by Bert\.")
    run.retry(by="Anna")
    told = [(event["event"], (event["detail"] or {}).get("by")) for event in run.history() if event["attempt"] is None]
    assert told[1:] == [
        ("paused", f"{getpass.getuser()}@{socket.gethostname()}"),
        ("resumed", "the night shift"),
        ("paused", "Anna"),
        ("cancel_requested", "Bert"),
        ("cancelled", None),
        ("retried", "Anna"),
    ]


def test_a_busy_worker_a_missing_task_a_missing_queue_and_a_lost_worker(
    cluster: Cluster, shop: Any, tmp_path: Path
) -> None:
    worker = cluster.worker(APP, concurrency=1)
    go = tmp_path / "go"
    held = shop.engine.submit(shop.hold.s(str(go)))
    becomes(
        held,
        rf"Step 0 \(tests.cli.shop.hold\) is held by worker worker1@localhost \(process \d+\) since {SINCE}, "
        rf"lease until {TIME}\.",
    )
    first, second = shop.engine.submit(shop.price.s(1)), shop.engine.submit(shop.price.s(2))
    becomes(first, rf"Step 0 \(.*\) waits since {SINCE} for a free slot in queue 'celery': the only one is busy\.")
    becomes(second, r"Step 0 .* for a free slot in queue 'celery', behind 1 step: the only one is busy\.")
    elsewhere = shop.engine.submit(shop.price.s(1).set(queue="rare"))
    becomes(
        elsewhere,
        rf"Step 0 \(.*\) is ready since {SINCE} in queue 'rare', which no live worker consumes "
        r"\(they consume celery\): start one with `celery -A <app> worker -Q rare`\.",
    )

    @shop.app.task(name="shop.new", shared=False)
    def new(value: str) -> str:
        return value

    unknown = shop.engine.submit(shop.app.signature("shop.new", args=["x"]))
    becomes(unknown, r"Step 0 \(shop.new\) .* no live worker on queue 'celery' has the task shop.new registered: .*")

    held.pause()
    becomes(held, r"Step 0 .* is held by worker .*; it stops at its next checkpoint, or goes on to its end\.")
    held.resume()
    worker.kill()
    becomes(
        held,
        rf"Step 0 \(.*\) was held by worker worker1@localhost, whose lease ended at {TIME}: starting a worker, or "
        r"`byrd relay`, will make ready it again\.",
    )
    cluster.worker(APP, concurrency=1, queues=["rare"])
    becomes(held, rf"Step 0 .* is ready .* in queue 'celery', .*; it lost its worker at {TIME} \(.*lease.* ran out\)\.")


#: The message must come while Redis still has a worker's word: usually that is good for a second only.
PATIENT = {"TEST_LEASE_SECONDS": "60", "TEST_POLL_SECONDS": "30"}


def frozen_in_wait(cluster: Cluster, worker: Worker) -> bool:
    """Freeze a worker just when Redis has its word that it takes the next message."""
    worker.sigstop()
    if somebody_waits(cluster):
        return True
    worker.sigcont()
    return False


def somebody_waits(cluster: Cluster) -> bool:
    with cluster.redis() as redis:
        db = str(redis.get_connection_kwargs().get("db", 0))
        clients = [client for client in redis.client_list() if client["db"] == db]
    return any(client["cmd"] == "brpop" and "b" in client["flags"] for client in clients)


def sent(submit: Callable[[], Any], done: Callable[[], bool], caplog: pytest.LogCaptureFixture) -> Any:
    """Submit a run whose messages are sent at once; again if they are not: a relay would send them, but is frozen."""
    for _ in range(3):
        run = submit()
        if done():
            return run
        time.sleep(1.5)
    raise AssertionError(f"no message was sent: {caplog.text}")


def length(cluster: Cluster) -> int:
    with cluster.redis() as redis:
        return int(redis.llen("celery"))


def test_a_message_that_is_not_taken(cluster: Cluster, shop: Any, caplog: pytest.LogCaptureFixture) -> None:
    worker = cluster.worker(APP, env=PATIENT)
    wait_until(lambda: frozen_in_wait(cluster, worker), what="worker that waits for a message")
    run = sent(lambda: shop.engine.submit(shop.price.s(1)), lambda: not somebody_waits(cluster), caplog)
    becomes(
        run,
        rf"Step 0 \(.*\) is ready since {SINCE} and its message was sent to queue 'celery', which is empty: it was "
        rf"lost, or a worker that is busy or frozen took it; it is sent again (at {TIME}|now)\.",
    )
    other = sent(lambda: shop.engine.submit(shop.price.s(1)), lambda: length(cluster) == 1, caplog)
    becomes(other, r"Step 0 .* was sent to queue 'celery', where 1 message is not taken yet; it is sent again .*")
    with cluster.redis() as redis:
        redis.flushdb()
    becomes(other, r"Step 0 .* was sent to queue 'celery', which is empty: it was lost, .*; \d steps? became ready .*")
    relay_until(shop, lambda relayed: relayed, what="a message sent again")
    again = rf"Step 0 .* was sent 2 times \(last at {TIME}\) to queue 'celery'"
    becomes(run, rf"{again}, where \d messages? (is|are) not taken yet; .*")
    needs_it = shop.engine.submit(shop.price.s(1).set(time_limit=60))
    with cluster.redis() as redis:
        messages = [raw for raw in redis.lrange("celery", 0, -1) if needs_it.steps()[0].id.encode() in raw]
        assert redis.lrem("celery", 1, messages[0]) == 1
    becomes(
        needs_it,
        r"Step 0 .* was sent to queue 'celery', and is not among the \d messages? there: it was lost, or a worker that "
        r"is busy or frozen took it; it is sent again .*",
    )
    relay_until(shop, lambda _: needs_it.steps()[0].sends == 2, what="the message that was lost to be sent again")
    lost = rf"Step 0 \(.*\) is ready since {SINCE} and its message was lost and sent again at {TIME}"
    becomes(
        needs_it, rf"{lost} \(sent 2 times so far\) to queue 'celery', where \d messages are not taken yet; it is .*"
    )
    cluster.rows("UPDATE byrd.steps SET sends = 3, sent_at = now() WHERE run_id = %s", needs_it.id)  # for its age alone
    becomes(
        needs_it, rf"Step 0 .* its message was sent 3 times \(at {TIME} because it was lost, last at {TIME}\) to .*"
    )
    worker.sigcont()
    assert run.get(timeout=30) == 2
    becomes(run, rf"It succeeded at {TIME}, .* after it was submitted\.")


def relay_until(shop: Any, done: Callable[[int], Any], *, what: str) -> None:
    """Play a relay until something has come of it."""
    sweeper = Sweeper(shop.engine.runtime, Settings())
    try:
        wait_until(lambda: done(sweeper.relay()), what=what)
    finally:
        sweeper.stop()


def test_of_many_that_are_alike_it_names_those_whose_messages_are_lost(
    cluster: Cluster, shop: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the queue is looked at once, for all of them."""
    worker = cluster.worker(APP, env=PATIENT)
    wait_until(lambda: frozen_in_wait(cluster, worker), what="worker that waits for a message")
    sent(lambda: shop.engine.submit(shop.price.s(0)), lambda: not somebody_waits(cluster), caplog)
    run = sent(
        lambda: shop.engine.submit(group(shop.price.s(n).set(time_limit=60) for n in range(10))),
        lambda: length(cluster) == 10,
        caplog,
    )
    steps = [step for step in run.steps() if step.task]
    subject = rf"\(no\. 0 to 9\) are ready since {SINCE} and their messages were"
    becomes(
        run, rf"10 steps of .* {subject} sent to queue 'celery', where 1?\d messages are not taken yet; the first .*"
    )
    cluster.rows("UPDATE byrd.steps SET wake_at = now() + interval '1 hour' WHERE status = 'ready'")  # no relay yet

    def lose(*numbers: int) -> None:
        with cluster.redis() as redis:
            for raw in redis.lrange("celery", 0, -1):
                if any(steps[no].id.encode() in raw for no in numbers):
                    assert redis.lrem("celery", 1, raw) == 1

    lose(7)
    becomes(run, r"Step 7 \(.*\) .* its message was sent to queue 'celery', and is not among the 9 messages there: .*")
    publisher, looks = type(shop.engine.runtime.publisher), []
    missing = publisher.missing

    def look(self: Any, queue: str, attempts: Any) -> Any:
        looks.append(queue)
        return missing(self, queue, attempts)

    monkeypatch.setattr(publisher, "missing", look)
    there, _ = run.why()
    assert re.fullmatch(
        rf"9 steps of .* {subject} sent to queue 'celery', where 9 messages are not taken yet; .*", there
    )
    assert looks == ["celery"]
    lose(2, 3, 4, 5)
    becomes(
        run,
        r"5 steps of .* \(no\. 2 to 7\) .* their messages were sent to queue 'celery', and are not among the 5 "
        r"messages there: they were lost, or workers that are busy or frozen took them; the first is sent again at .*",
    )
    cluster.rows("UPDATE byrd.steps SET wake_at = now() WHERE status = 'ready'")
    relay_until(shop, lambda _: sum(step.sends for step in run.steps()) == 15, what="five messages sent again")
    again = (
        rf"were lost and sent again \(the first at {TIME}, sent 2 times so far\) to queue 'celery', where 1\d messages"
    )
    becomes(run, rf"5 steps of .* \(no\. 2 to 7\) are ready since {SINCE} and their messages {again} .*")
    becomes(run, r"5 steps of .* \(no\. 0 to 9\) .* their messages were sent to queue 'celery', where 1\d messages .*")
    worker.sigcont()
    assert run.get(timeout=60) == [2 * n for n in range(10)]


@pytest.fixture
def own(cluster_on: ClusterFactory, own_postgres: EmbeddedPostgres, own_broker: EmbeddedValkey) -> Cluster:
    return cluster_on(database_url=own_postgres.url, broker_url=own_broker.url)


def test_a_broker_or_a_database_that_is_away(
    own: Cluster,
    own_postgres: EmbeddedPostgres,
    own_broker: EmbeddedValkey,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shop, byrd_cli = own.app(APP), cli_on(own, monkeypatch)
    own.worker(APP)
    own_broker.kill()
    run = shop.engine.submit(shop.price.s(1))
    becomes(
        run,
        rf"Step 0 \(.*\) is ready since {SINCE} but the broker, redis://:\*\*@127.0.0.1:\d+/0, does not answer here "
        r"\(.*refused.*\): its message is sent to queue 'celery' once it does\.",
    )
    assert "does not answer here" in byrd_cli("why", run.id).out
    own_postgres.kill()
    answer = byrd_cli("why", run.id)
    assert (answer.status, answer.out) == (1, "")
    assert re.match(r"Error: Postgres at 127\.0\.0\.1:\d+ does not answer: .*", answer.err)
    own_postgres.start()
    own_broker.start()
    assert run.get(timeout=60) == 2


def test_a_step_that_kills_its_worker_is_suspected(cluster: Cluster, shop: Any, tmp_path: Path) -> None:
    cluster.worker(APP, concurrency=1)
    run = shop.engine.submit(shop.kill_twice_and_hold.s(str(tmp_path)))
    becomes(
        run,
        rf"Step 0 \(.*\) is held by worker worker1@localhost \(process \d+\) since {SINCE}, attempt 3, lease until "
        rf"{TIME}; it lost its worker 2 times \(the last time at {TIME}: pool process \d+.*\), and fails with "
        r"StepLostError if it does 4 times more\.",
    )
    (tmp_path / "go").touch()
    assert run.get(timeout=30) == 3


def test_a_task_with_a_rate_limit(cluster: Cluster, shop: Any) -> None:
    cluster.worker(APP)
    runs = [shop.engine.submit(shop.slow_down.s(n)) for n in range(3)]
    [first] = wait_until(lambda: [run for run in runs if run.status == "succeeded"])
    other = next(run for run in runs if run != first)
    becomes(other, r"Step 0 .* is ready since .*; its task is limited to 1/h, so a worker may hold it back\.")


def test_a_worker_that_shuts_down(cluster: Cluster, shop: Any, tmp_path: Path) -> None:
    worker = cluster.worker(APP, concurrency=1)
    held = shop.engine.submit(shop.hold.s(str(tmp_path / "go"), 7))
    becomes(held, r"Step 0 .* is held by worker .*")
    os.kill(worker.pid, signal.SIGTERM)
    becomes(
        held,
        r"Step 0 .* is held by worker .*; the worker is shutting down, and gives it back at its next checkpoint unless "
        r"it ends before\.",
    )
    run = shop.engine.submit(shop.price.s(1))
    becomes(run, rf"Step 0 \(.*\) is ready since {SINCE} but every worker that is alive is shutting down: start one .*")
    (tmp_path / "go").touch()
    assert held.get(timeout=30) == 7


def test_retries_rollbacks_and_ends(cluster: Cluster, shop: Any, tmp_path: Path, byrd_cli: Cli) -> None:
    cluster.worker(APP)
    unlucky = shop.engine.submit(shop.unlucky.s(600))
    becomes(
        unlucky,
        r"Step 0 \(.*\) is tried again \(retry 1\) at .* \(in (10|9) min.*\), after "
        r"ConnectionError: the bank is closed\.",
    )
    assert "again at" in byrd_cli("show", unlucky.id).out
    failed = shop.engine.submit(shop.refuse.s())
    becomes(
        failed,
        rf"It failed at {TIME}: step 0 \(.*refuse\) ended with ValueError: \[bold red\]no\[/\] <b>money</b> left\.",
    )
    assert failed.why()[1] == f"`byrd retry {failed.id[:8]}` keeps what succeeded and tries the rest again."
    late = shop.engine.submit("shop.late", str(tmp_path / "never"))
    becomes(
        late, rf"It is being cancelled since {SINCE} because its deadline had passed, and waits for what still runs .*"
    )
    (tmp_path / "never").touch()
    becomes(late, rf"It failed at {TIME}: its deadline, {TIME}, had passed, so it was stopped\.")

    hotel = tmp_path / "hotel"
    trip = shop.engine.submit("shop.trip", str(hotel))
    becomes(
        trip,
        rf"Its rollback is stuck since {TIME} at step 3 \(.*compensation\), which undoes step 1: RuntimeError: the "
        r"hotel does not answer, in attempt 1; 0 of 2 compensations done\. Remove the cause, then "
        rf"`byrd retry {trip.id[:8]}`; or `byrd skip {trip.id[:8]} 3 --reason \.\.\.`, or undo it yourself, and "
        rf"`byrd done-by-hand {trip.id[:8]} 3 --note \.\.\.`\.",
    )
    drawn = byrd_cli("show", trip.id).out
    assert "rollback" in drawn
    assert re.search(r"✘ 3 \S+  undoes 1 tests.cli.shop.reserve", drawn)
    hotel.touch()
    assert byrd_cli("retry", trip.id).out.startswith(f"Run {trip.id[:8]} is compensating again")
    becomes(trip, r"2 completed steps were undone; submit it anew\.")


@pytest.mark.parametrize(
    "seconds, words",
    [
        (-1, "0 ms"),
        (0.04, "40 ms"),
        (1.234, "1.2 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (86_400 * 3, "3 days"),
    ],
)
def test_durations_read_well(seconds: float, words: str) -> None:
    assert span(seconds) == words
