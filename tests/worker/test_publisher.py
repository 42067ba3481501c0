"""Wake-ups go out in order, many per round trip, and neither a bad one nor a dead broker takes others with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import redis
from celery import Celery

from byrd.embedded import EmbeddedValkey
from byrd.store import Wakeup
from byrd.store.rows import Consumers
from byrd.task import publisher as publisher_module
from byrd.task.publisher import Publisher
from tests.cluster import wait_until


@pytest.fixture
def app(broker_url: str) -> Iterator[Celery]:
    app = Celery("publisher", broker=broker_url, set_as_current=False)
    app.conf.task_create_missing_queues = False
    app.conf.broker_transport_options = {"socket_connect_timeout": 5, "socket_timeout": 5}
    yield app
    app.close()


def _wakeup(no: int, *, queue: str = "celery", due: bool = True) -> Wakeup:
    return Wakeup(f"step-{no}", "run", no, "task", "shop.price", queue, 0, 0, "{}", None, None, None, due)


def _shared(no: int, *, queue: str = "celery") -> Wakeup:
    """Return the wake-up of a step that needs no message of its own."""
    return _wakeup(no, queue=queue)._replace(solo=False)


def _sent(broker_url: str) -> list[int]:
    """Return the numbers of the steps in the queue, the oldest first."""
    with redis.Redis.from_url(broker_url) as client:
        messages = [json.loads(raw) for raw in reversed(client.lrange("celery", 0, -1))]
    return [message["headers"]["byrd"]["no"] for message in messages]


def test_more_wakeups_than_one_batch_holds_arrive_in_order(app: Celery, broker_url: str) -> None:
    assert Publisher(app).publish(_wakeup(no) for no in range(250))
    assert _sent(broker_url) == list(range(250))


def test_only_what_is_due_is_sent(app: Celery, broker_url: str) -> None:
    assert Publisher(app).publish([_wakeup(1), _wakeup(2, due=False), _wakeup(3)])
    assert _sent(broker_url) == [1, 3]


def test_a_wakeup_that_cannot_be_sent_does_not_hold_up_the_others(app: Celery, broker_url: str) -> None:
    assert not Publisher(app).publish([_wakeup(1), _wakeup(2, queue="unknown"), _wakeup(3)])
    assert _sent(broker_url) == [1, 3]


def test_who_consumes_a_queue_is_asked_again_while_much_is_published(
    app: Celery, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each step would have a message of its own for ever, for a consumer that is gone."""
    monkeypatch.setattr(publisher_module, "_CONSUMERS_SECONDS", 0.0)
    shared, published, ends = [False], 0, time.monotonic() + 1.5
    publisher = Publisher(app, lambda _queue: Consumers(1, shared[0], workers=1))
    while time.monotonic() < ends:
        assert publisher.publish([_shared(published)])
        shared[0], published = True, published + 1
        time.sleep(0.02)
    assert 16 <= len(_sent(broker_url)) < published


@pytest.mark.parametrize(("processes", "lasts"), [(4, "_TAKING_SECONDS"), (0, "_NOBODY_SECONDS")])
def test_a_queue_that_was_found_full_is_not_looked_at_again_at_once(
    app: Celery, broker_url: str, monkeypatch: pytest.MonkeyPatch, processes: int, lasts: str
) -> None:
    monkeypatch.setattr(publisher_module, lasts, 100.0)
    publisher = Publisher(app, lambda _queue: Consumers(processes, True, workers=processes))
    assert publisher.publish(_shared(no) for no in range(16))
    assert publisher.publish([_shared(16)])
    assert _sent(broker_url) == [*range(16)]
    with redis.Redis.from_url(broker_url) as client:
        client.delete("celery")
        looks = client.info("commandstats")["cmdstat_lindex"]["calls"]
        assert publisher.publish([_shared(17)])
        assert not _sent(broker_url), "there is enough to do with sixteen wake-ups"
        assert client.info("commandstats")["cmdstat_lindex"]["calls"] == looks
        assert publisher.publish([_shared(18), _wakeup(19)])
        assert _sent(broker_url) == [19], "what needs a message of its own has it"


def test_a_queue_that_is_filled_while_it_is_looked_at_is_not_taken_for_one_that_ends_with_wakeups(app: Celery) -> None:
    """The two answers are of two moments."""
    pipe = MagicMock()
    pipe.__enter__.return_value.lindex.return_value.lindex.return_value.execute.return_value = [
        None,
        publisher_module._SHARED,
    ]
    channel = SimpleNamespace(client=SimpleNamespace(pipeline=lambda **_: pipe))
    assert Publisher(app)._look(channel, "celery", 16) == (0, False)


def test_a_full_queue_is_looked_at_again_once_all_may_have_been_taken(
    app: Celery, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_TAKING_SECONDS", 0.02)
    publisher = Publisher(app, lambda _queue: Consumers(8, True, workers=4))
    assert publisher.publish(_shared(no) for no in range(16))
    assert publisher.publish([_shared(16)])
    with redis.Redis.from_url(broker_url) as client:
        client.delete("celery")
    time.sleep(0.09)
    assert publisher.publish([_shared(17)])
    assert _sent(broker_url) == [17]


def test_a_full_queue_is_looked_at_again_at_once_when_it_does_not_end_with_wakeups(
    app: Celery, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one wake-up in it may be taken at once, and others run something else."""
    monkeypatch.setattr(publisher_module, "_TAKING_SECONDS", 100.0)
    monkeypatch.setattr(publisher_module, "_ROOM_SECONDS", 0.0)
    publisher = Publisher(app, lambda _queue: Consumers(8, True, workers=4))
    with redis.Redis.from_url(broker_url) as client:
        assert publisher.publish([_shared(0)])
        assert publisher.publish(_wakeup(no) for no in range(1, 16))
        assert publisher.publish([_shared(16)])
        assert _sent(broker_url) == [*range(16)], "one more would tell nobody anything"
        assert b"step-0" in client.rpop("celery")
        assert publisher.publish([_shared(17)])
        assert _sent(broker_url) == [*range(1, 16), 17]


def test_a_full_queue_is_forgotten_once_it_has_a_consumer_that_needs_each_message(
    app: Celery, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_CONSUMERS_SECONDS", 0.0)
    monkeypatch.setattr(publisher_module, "_TAKING_SECONDS", 100.0)
    shared = [True]
    publisher = Publisher(app, lambda _queue: Consumers(2, shared[0], workers=1))
    assert publisher.publish(_shared(no) for no in range(20))
    assert publisher.publish([_shared(20)])
    assert _sent(broker_url) == [*range(16)]
    shared[0] = False
    assert publisher.publish([_shared(21)])
    assert _sent(broker_url)[-1] == 21


def test_a_full_queue_keeps_nothing_from_another(app: Celery, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "_TAKING_SECONDS", 100.0)
    app.conf.task_create_missing_queues = True
    publisher = Publisher(app, lambda _queue: Consumers(2, True, workers=1))
    for _ in range(2):
        assert publisher.publish(_shared(no) for no in range(20))
    both = [_shared(20), _shared(21, queue="other")]
    assert publisher.publish(both)
    assert _sent(broker_url) == [*range(16)]
    assert publisher.count("other") == 1


def test_whoever_asks_for_room_may_publish_upon_the_answer(
    app: Celery, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_TAKING_SECONDS", 100.0)
    publisher = Publisher(app, lambda _queue: Consumers(2, True, workers=1))
    for _ in range(2):
        assert publisher.publish(_shared(no) for no in range(16))
    assert publisher.room("celery") == 0
    assert publisher.publish([_shared(16)])
    with redis.Redis.from_url(broker_url) as client:
        client.delete("celery")
    assert publisher.room("celery") == 16
    assert publisher.publish([_shared(17)])
    assert _sent(broker_url) == [17]


def test_that_nobody_consumes_a_queue_is_soon_asked_again(
    app: Celery, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_CONSUMERS_SECONDS", 100.0)
    monkeypatch.setattr(publisher_module, "_NOBODY_SECONDS", 0.0)
    asked: list[str] = []

    def ask(queue: str) -> Consumers:
        asked.append(queue)
        return Consumers(0, True, workers=0)

    publisher = Publisher(app, ask)
    wait_until(lambda: publisher.publish([_shared(1)]) and len(asked) > 2, timeout=10)


def test_as_many_processes_as_wakeups_are_enough_for_may_have_taken_them_already(
    app: Celery, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_TAKING_SECONDS", 0.02)
    publisher = Publisher(app, lambda _queue: Consumers(100, True, workers=100))
    assert publisher.publish(_shared(no) for no in range(120))
    assert publisher.publish([_shared(120)])
    assert len(_sent(broker_url)) == 100
    with redis.Redis.from_url(broker_url) as client:
        client.delete("celery")
    time.sleep(0.025)
    assert publisher.publish([_shared(121)])
    assert _sent(broker_url) == [121]


@pytest.mark.parametrize("prefix", ["", "own."])
def test_which_messages_are_missing(app: Celery, broker_url: str, prefix: str) -> None:
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, "global_keyprefix": prefix}
    publisher, odd = Publisher(app), 'of "quotes", \\ and é'
    kept = [_wakeup(1), _wakeup(2)._replace(options='{"priority": 9}'), _wakeup(3)._replace(id=odd)]
    assert publisher.publish([*kept, _wakeup(4, queue="celery")._replace(attempt=2)])
    ids = {wakeup.id: 0 for wakeup in kept}
    assert publisher.missing("celery", {**ids, "step-4": 2}) == []
    assert publisher.missing("celery", {**ids, "step-4": 3, "step-5": 0}) == ["step-4", "step-5"]
    assert publisher.missing("other", ids) == list(ids)
    with redis.Redis.from_url(broker_url) as client:
        assert client.rpop(f"{prefix}celery")
    assert publisher.missing("celery", ids) == ["step-1"]


@pytest.mark.parametrize(("messages", "size", "told"), [(400, 10, True), (501, 10, False), (100, 100_000, False)])
def test_a_queue_that_is_too_long_or_too_large_is_not_read(
    app: Celery, broker_url: str, messages: int, size: int, *, told: bool
) -> None:
    with redis.Redis.from_url(broker_url) as client:
        client.lpush("celery", *["x" * size] * messages)
    assert Publisher(app).missing("celery", {"step-1": 0}) == (["step-1"] if told else None)


def test_a_dead_broker_does_not_say_what_is_missing(own_broker: EmbeddedValkey) -> None:
    app = Celery("publisher", broker=own_broker.url, set_as_current=False)
    own_broker.kill()
    assert Publisher(app).missing("celery", {"step-1": 0}) is None
    app.close()


def test_a_broker_of_another_kind_does_not_say_what_is_missing() -> None:
    with Celery("publisher", broker="memory://", set_as_current=False) as app:
        assert Publisher(app).missing("celery", {"step-1": 0}) is None


@pytest.mark.parametrize("count", [1, 250])
def test_a_dead_broker_is_told_not_raised_and_served_again_once_it_is_back(
    own_broker: EmbeddedValkey, count: int
) -> None:
    app = Celery("publisher", broker=own_broker.url, set_as_current=False)
    publisher = Publisher(app)
    assert publisher.publish([_wakeup(1)])
    own_broker.kill()
    started = time.monotonic()
    assert not publisher.publish(_wakeup(no) for no in range(count))
    assert time.monotonic() - started < 10  # once, not once for each
    own_broker.start()
    with redis.Redis.from_url(own_broker.url) as client:
        client.delete("celery")
    wait_until(lambda: publisher.publish(_wakeup(no) for no in range(count)), timeout=10)  # it is not asked at once
    assert _sent(own_broker.url) == list(range(count))
    app.close()
