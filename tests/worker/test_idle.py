"""A step that becomes ready while a process waits for work is offered to it, and needs no message."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery import Celery

from byrd.embedded import EmbeddedPostgres, EmbeddedValkey
from byrd.store import Wakeup
from byrd.store.rows import Consumers
from byrd.task import idle
from byrd.task.idle import Idle
from byrd.task.publisher import Publisher
from tests.cluster import Cluster, ClusterFactory, Worker, wait_until
from tests.invariants import check_database
from tests.notes import lines

APP = "tests.apps.slices"
#: A process waits for as long, at once, unless it is told to cease.
LONG = {"TEST_SLICE_SECONDS": "20", "TEST_WAIT_SECONDS": "20"}
KEY = idle.Keys("").queue("", "celery")


def _wakeup(no: int) -> Wakeup:
    return Wakeup(f"step-{no}", "run", no, "task", "shop.price", "celery", 0, 0, "{}", None, None, None, True, False)


# ------------------------------------------------------------------------------------------------- offers


@pytest.fixture(params=["", "shop:"], ids=["no prefix", "a prefix"])
def app(broker_url: str, request: pytest.FixtureRequest) -> Iterator[Celery]:
    app = Celery("idle", broker=broker_url, set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": request.param}
    yield app
    app.close()


@pytest.fixture
def client(app: Celery) -> Iterator[Any]:
    with app.connection_for_write() as connection:
        yield connection.default_channel.client


def waiting(broker_url: str) -> set[int]:
    """Return the ports of those that wait for an offer or, a worker's main process, for a message."""
    with redis.Redis.from_url(broker_url) as direct:
        db = str(direct.get_connection_kwargs().get("db", 0))
        clients = [one for one in direct.client_list() if one["db"] == db and "b" in one["flags"]]
    return {int(one["addr"].rpartition(":")[2]) for one in clients}


def test_an_offer_that_nobody_waits_for_leaves_nothing_behind(client: Any, broker_url: str) -> None:
    assert idle.offer(client, KEY, [_wakeup(no) for no in range(3)]) == 3
    with redis.Redis.from_url(broker_url) as direct:
        assert direct.keys() == []


def test_one_that_waits_is_given_one_step_of_its_queues(app: Celery, broker_url: str) -> None:
    found: list[Any] = []
    waiter, publisher = Publisher(app), Publisher(app, lambda _: Consumers(2, True, workers=1))
    waits = threading.Thread(target=lambda: found.append(waiter.wait_for_offer(["rare", "celery"], "w", 30.0)))
    waits.start()
    wait_until(lambda: waiting(broker_url))
    assert publisher.publish([_wakeup(7)._replace(queue="other")])
    assert publisher.publish([_wakeup(8)._replace(solo=True)])
    assert publisher.publish([_wakeup(9)], offer=False)
    assert publisher.publish([_wakeup(1), _wakeup(2), _wakeup(3)])
    waits.join(10)
    assert found == [{"step": "step-1", "attempt": 0, "task": "shop.price"}]
    assert publisher.publish([_wakeup(4)]), "it does not wait any more"
    assert published(app, "celery") == [8, 9, 2, 3, 4]
    assert published(app, "other") == [7]


def published(app: Celery, queue: str) -> list[int]:
    """Return the numbers of the steps in a queue, the oldest first."""
    prefix = app.conf.broker_transport_options["global_keyprefix"]
    with redis.Redis.from_url(app.conf.broker_url) as direct:
        messages = [json.loads(raw) for raw in reversed(direct.lrange(f"{prefix}{queue}", 0, -1))]
    return [message["headers"]["byrd"]["no"] for message in messages]


def test_where_enough_wake_ups_wait_nothing_is_offered(app: Celery, broker_url: str) -> None:
    """Whoever submits much would ask in vain each time: no process waits for work while messages do."""
    publisher = Publisher(app, lambda _: Consumers(2, True, workers=1))
    assert publisher.publish(_wakeup(no) for no in range(16))
    with redis.Redis.from_url(broker_url) as direct:
        pushed = direct.info("commandstats")["cmdstat_lpush"]["calls"]
        assert publisher.publish([_wakeup(16)])
        assert direct.info("commandstats")["cmdstat_lpush"]["calls"] == pushed
    assert published(app, "celery") == [*range(16)]


@pytest.mark.parametrize("denied", ["-lpush", "-rpop"])
def test_a_broker_that_allows_no_offers_is_published_to(
    own_broker: EmbeddedValkey, caplog: pytest.LogCaptureFixture, denied: str
) -> None:
    with redis.Redis.from_url(own_broker.url) as direct:
        selectors = ["(+@all ~celery* ~_kombu* ~unacked*)", f"(+@all {denied} ~byrd.*)"]
        direct.execute_command("ACL", "SETUSER", "shy", "on", ">pw", "+@connection", *selectors)
        url = own_broker.url.replace("redis://", "redis://shy:pw@")
        with Celery("idle", broker=url, set_as_current=False) as app:
            publisher = Publisher(app, lambda _: Consumers(2, True, workers=1))
            assert all(publisher.publish([_wakeup(no)]) for no in range(3))
            assert direct.llen("celery") == 3
            assert not publisher.takes_offers()
            assert [record.getMessage() for record in caplog.records if "takes no offers" in record.getMessage()]
        wait_until(lambda: direct.keys("byrd*") == [], timeout=10)


def test_one_that_waits_ceases_when_it_is_told_to(app: Celery, broker_url: str) -> None:
    publisher, began, found = Publisher(app), time.monotonic(), list[Any]()
    waits = threading.Thread(target=lambda: found.append(publisher.wait_for_offer(["celery"], "w", 60.0)))
    waits.start()
    wait_until(lambda: waiting(broker_url))
    publisher.cease_to_wait("another")
    publisher.cease_to_wait("w")
    waits.join(10)
    assert found == [None]
    assert time.monotonic() - began < 10
    with redis.Redis.from_url(broker_url) as direct:  # what nobody has heard is forgotten
        wait_until(lambda: direct.keys() == [], timeout=10)


def test_a_broker_of_another_kind_takes_no_offers() -> None:
    with Celery("idle", broker="memory://", set_as_current=False) as app:
        assert not Publisher(app).takes_offers()


def test_it_does_not_wait_much_longer_than_it_is_to(app: Celery) -> None:
    began = time.monotonic()
    assert Publisher(app).wait_for_offer(["celery"], "w", 0.2) is None
    assert 0.2 <= time.monotonic() - began < 5


def test_of_many_who_offer_at_once_each_step_wakes_somebody(app: Celery, client: Any, broker_url: str) -> None:
    """Somebody is given it, or it is published: as many as are offered, though not always the very same."""
    offers, given = 400, list[Any]()
    over = threading.Event()

    def take(publisher: Publisher) -> None:
        while not over.is_set():
            found = publisher.wait_for_offer(["celery"], "w", 5.0)
            if found is not None:
                given.append(found)

    with ThreadPoolExecutor(8) as pool:
        takers = [pool.submit(take, Publisher(app)) for _ in range(2)]
        wait_until(lambda: len(waiting(broker_url)) == 2)
        key = idle.Keys("").queue(app.conf.broker_transport_options["global_keyprefix"], "celery")
        left = list(pool.map(lambda no: idle.offer(client, key, [_wakeup(no)]), range(offers)))
        over.set()
        for taker in takers:
            taker.result(30)
    assert len(given) + sum(left) == offers
    assert given, "else it is not tried"


def test_a_broker_that_is_away_is_not_waited_for(own_broker: EmbeddedValkey) -> None:
    app = Celery("idle", broker=own_broker.url, set_as_current=False)
    publisher, found = Publisher(app), list[Any]()
    waits = threading.Thread(target=lambda: found.append(publisher.wait_for_offer(["celery"], "w", 60.0)))
    waits.start()
    wait_until(lambda: waiting(own_broker.url))
    own_broker.kill()
    waits.join(10)
    assert found == [None]
    publisher.cease_to_wait("w")
    own_broker.start()
    wait_until(publisher.takes_offers)
    wait_until(lambda: publisher.publish([_wakeup(0)]), timeout=30)
    app.close()


def test_only_one_process_waits_and_only_while_another_is_free() -> None:
    page = Idle()
    assert not page.begin(60), "it is not known"
    page.note_free(free=True)
    assert page.begin(60)
    assert page.waits()
    assert not page.begin(60)
    page._page[2] = 1.0
    page.end()
    assert page.waits(), "another process does"
    page._page[2] = os.getpid()
    page.end()
    page.note_free(free=False)
    assert not page.begin(60)
    assert not page.waits()
    page.note_free(free=True)
    assert page.begin(-1.0)
    assert not page.waits(), "a process that is gone does not say so; after its time another one waits"


# ------------------------------------------------------------------------------------------------- workers


@pytest.fixture
def start(cluster: Cluster, notes: Path) -> Callable[..., Worker]:
    def start(**env: str) -> Worker:
        return cluster.worker(APP, concurrency=2, env={"NOTES": str(notes), **LONG, **env})

    return start


def who_waits(cluster: Cluster, worker: Worker) -> list[int]:
    """Return the pool processes that wait for an offer."""
    ports = waiting(cluster.broker_url)
    return [pid for pid in worker.pids() if ports & {one.laddr.port for one in psutil.Process(pid).net_connections()}]


def have_one_wait(cluster: Cluster, worker: Worker) -> int:
    """Have a process run a step, and wait for an offer then; return its id."""
    app = cluster.app(APP)

    def waits() -> list[int]:
        assert app.engine.submit(app.tick.s("first")).get(timeout=30) == "first"
        time.sleep(0.1)
        return who_waits(cluster, worker)

    [pid] = wait_until(waits, what="a process that waits for an offer")
    return pid


def test_while_a_process_waits_a_step_needs_no_message(
    cluster: Cluster, notes: Path, start: Callable[..., Worker]
) -> None:
    app, worker, runs = cluster.app(APP), start(), []
    for n in range(20):
        have_one_wait(cluster, worker)
        runs.append(app.engine.submit(app.tick.s(n) | app.tick.s()))
        assert runs[-1].get(timeout=30) == n
    received = {line["id"] for line in lines(notes, "received")}
    assert not received & {step.id for run in runs for step in run.steps()}
    assert set(Counter(line["id"] for line in lines(notes, "ran")).values()) == {1}
    check_database(cluster.database_url)


@pytest.mark.parametrize("what", ["a plain task", "a step that needs its message"])
def test_a_message_is_not_kept_waiting(cluster: Cluster, notes: Path, start: Callable[..., Worker], what: str) -> None:
    """Though the process that waits would do so for longer, and so would the other be busy."""
    app, worker = cluster.app(APP), start()
    have_one_wait(cluster, worker)
    busy = app.nap.delay(10.0).id
    [napping] = wait_until(lambda: [line for line in lines(notes, "ran") if line["id"] == busy])
    if what == "a plain task":
        task_id = app.tick.delay(1).id
    else:
        task_id = app.engine.submit(app.tick.s(1).set(time_limit=60)).steps()[0].id
    [ran] = wait_until(lambda: [line for line in lines(notes, "ran") if line["id"] == task_id])
    assert ran["at"] < napping["at"] + 9
    check_database(cluster.database_url)


def test_a_worker_stops_while_one_waits(cluster: Cluster, start: Callable[..., Worker]) -> None:
    worker = start(TEST_WAIT_SECONDS="0.5")
    have_one_wait(cluster, worker)
    assert worker.stop(timeout=10) == 0


def test_the_relay_offers_nothing(cluster: Cluster, notes: Path, start: Callable[..., Worker]) -> None:
    """What was offered before, perhaps to one that may not run it, is to have its message."""
    app, worker = cluster.app(APP), start()
    have_one_wait(cluster, worker)
    with app.engine.runtime.store.engine.begin() as conn:  # then it is the relay that publishes it
        run = app.engine.submit(app.tick.s(1), connection=conn)
    assert run.get(timeout=30) == 1
    assert {step.id for step in run.steps()} <= {line["id"] for line in lines(notes, "received")}


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_what_was_offered_to_a_process_that_is_gone_is_sent_again(
    cluster: Cluster, notes: Path, start: Callable[..., Worker], how: str
) -> None:
    app = cluster.app(APP)
    worker = start()
    pid = have_one_wait(cluster, worker)
    psutil.Process(pid).suspend()
    run = app.engine.submit(app.tick.s(2))
    wait_until(lambda: not who_waits(cluster, worker), what="the step to be given to the process that is frozen")
    assert cluster.rows("SELECT sends FROM byrd.steps WHERE run_id = %s AND status = 'ready'", run.id) == [(1,)]
    if how == "killed":
        psutil.Process(pid).send_signal(signal.SIGKILL)
    assert run.get(timeout=30) == 2
    if how == "frozen":
        psutil.Process(pid).resume()
        again = app.engine.submit(app.tick.s(3))
        assert again.get(timeout=30) == 3
    assert set(Counter(line["id"] for line in lines(notes, "ran")).values()) == {1}
    check_database(cluster.database_url)


def test_a_broker_that_is_restarted_while_one_waits(
    own_postgres: EmbeddedPostgres, own_broker: EmbeddedValkey, cluster_on: ClusterFactory, notes: Path
) -> None:
    cluster = cluster_on(database_url=own_postgres.url, broker_url=own_broker.url)
    app = cluster.app(APP)
    worker = cluster.worker(APP, concurrency=2, env={"NOTES": str(notes), **LONG})
    have_one_wait(cluster, worker)
    own_broker.kill()
    run = app.engine.submit(app.tick.s(2))
    own_broker.start()
    assert run.get(timeout=60) == 2
    wait_until(lambda: app.engine.submit(app.tick.s(3)).get(timeout=30) == 3)
    check_database(cluster.database_url)
