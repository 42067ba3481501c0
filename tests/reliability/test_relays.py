"""Relays: any number may run at once, and any may die between what it commits and what it publishes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from byrd.embedded import EmbeddedValkey
from byrd.engine import Run
from byrd.store.flow import RESEND_SECONDS
from byrd.store.rows import CHANNEL
from byrd.worker import Settings, Sweeper
from tests.cluster import ROOT, Cluster, ClusterFactory, wait_until
from tests.invariants import check_database
from tests.reliability.outages import APP, log
from tests.reliability.test_messages import queued, run_script
from tests.reliability.test_redis import fill

#: All that wait are to be looked at now, and each relay is told so.
LOOK = f"""UPDATE byrd.steps SET wake_at = now() - interval '1 s' WHERE status = 'ready' AND wake_at < 'infinity';
           NOTIFY {CHANNEL}"""


@contextmanager
def relays(cluster: Cluster, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Have so many `byrd relay`, each a process."""
    command = [sys.executable, "-c", "from byrd.cli import main; main()", "-A", APP, "relay", "--json"]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=cluster.env, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert "started" in process.stdout.readline()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=30)


def know_broker(cluster: Cluster) -> None:
    """Leave the relay's mark in the broker, before there is anything to send."""
    sweeper = Sweeper(cluster.app(APP).engine.runtime, Settings())
    try:
        sweeper.relay()
    finally:
        sweeper.stop()


def submit(cluster: Cluster, count: int, **options: Any) -> list[Run]:
    app = cluster.app(APP)
    return [app.engine.submit(app.add.s(n, 1).set(**options)) for n in range(count)]


def sends(cluster: Cluster, *, solo: bool = True) -> list[int]:
    """Return how often the message was sent of each step that waits: of those that need it, or of the others."""
    rows = cluster.rows("SELECT sends FROM byrd.steps WHERE status = 'ready' AND solo = %s", solo)
    return [count for (count,) in rows]


def messages(cluster: Cluster) -> list[int]:
    """Return how many messages there are of each step that waits and needs one."""
    there = b"".join(queued(cluster))
    ids = cluster.rows("SELECT id FROM byrd.steps WHERE status = 'ready' AND solo")
    return [there.count(f'"step": "{step_id}"'.encode()) for (step_id,) in ids]


def late(cluster: Cluster) -> int:
    [(count,)] = cluster.rows(
        "SELECT count(*) FROM byrd.steps WHERE status = 'ready' AND solo AND wake_at <= clock_timestamp()"
    )
    return int(count)


# ------------------------------------------------------------------------------------------------- two at once


def test_two_relays_at_once_send_what_is_lost_once(cluster: Cluster) -> None:
    """Both are told at the same moment to look at all that waits, twenty times over: each loss is made good once."""
    know_broker(cluster)
    runs, line = submit(cluster, 40, time_limit=60), submit(cluster, 40, queue="line")
    with cluster.redis() as client, relays(cluster, 2):
        client.delete("line")
        for _ in range(20):
            assert len(client.rpop("celery", 2)) == 2  # the oldest, of steps that have lost none so far
            cluster.rows(LOOK)
            wait_until(lambda: late(cluster) == 0, what="a look at each step")
            wait_until(lambda: min(messages(cluster)) > 0, what="a message for each step")
        assert messages(cluster) == [1] * 40
        assert sends(cluster) == [2] * 40
        assert 1 <= client.llen("line") <= 2 * 16, "enough to wake whoever comes"
    cluster.worker(APP, queues=["celery", "line"])
    assert [run.get(timeout=60) for run in [*runs, *line]] == [*range(1, 41)] * 2
    assert Counter(step.attempt for run in [*runs, *line] for step in run.steps()) == {1: 80}
    check_database(cluster.database_url)


def test_two_relays_at_once_of_a_queue_too_long_to_be_read(cluster: Cluster) -> None:
    """There it is only counted how many are missing; both may make the same loss good, and then no more are sent."""
    know_broker(cluster)
    app = cluster.app(APP)
    app.engine.submit_many(app.add.s(n, 1).set(time_limit=60) for n in range(600))
    # Whatever waits long is sent again for its age alone: here nothing ever does.
    look = LOOK.replace("SET", "SET ready_at = now(),")
    with cluster.redis() as client:
        assert client.ltrim("celery", 0, -51)  # fifty are lost
        with relays(cluster, 2):
            cluster.rows(look)
            wait_until(lambda: client.llen("celery") >= 600, timeout=60, what="as many messages as steps")
            for _ in range(3):
                wait_until(lambda: late(cluster) == 0, timeout=60, what="a look at each step")
                cluster.rows(look)
            wait_until(lambda: late(cluster) == 0, timeout=60, what="a look at each step")
            assert client.llen("celery") <= 600 + 25, "each had counted before the other had sent, once at most"
        # Which steps that were is chance: one and the same may be sent by both.
        assert cluster.rows("SELECT sum(sends) FROM byrd.steps") == [(client.llen("celery") + 50,)]
    check_database(cluster.database_url)


# ------------------------------------------------------------------------------------------------- one that dies

_DIES_BEFORE_IT_PUBLISHES = """
import os, signal
from celery.signals import before_task_publish
import tests.apps.basic as shop
from byrd.worker import Settings, Sweeper
before_task_publish.connect(lambda **_: os.kill(os.getpid(), signal.SIGKILL), weak=False)
sweeper = Sweeper(shop.engine.runtime, Settings())
while True:
    sweeper.relay()
"""
#: Redis has refused the messages, and Postgres is not told so.
_DIES_BEFORE_IT_SAYS_SO = """
import os, signal
import tests.apps.basic as shop
from byrd.store import sweeps
from byrd.worker import Settings, Sweeper
sweeps.not_sent = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sweeper = Sweeper(shop.engine.runtime, Settings())
while True:
    sweeper.relay()
"""


def longest_pause(cluster: Cluster) -> float:
    """Return how long it is at most until the steps that wait are looked at."""
    [(pause,)] = cluster.rows("SELECT extract(epoch FROM max(wake_at) - now()) FROM byrd.steps WHERE status = 'ready'")
    return float(pause)


@pytest.mark.parametrize(
    ("kind", "committed", "pause"),
    [("due", 1, RESEND_SECONDS), ("lost", 2, 2 * RESEND_SECONDS), ("shared", 2, 0.0)],
)
def test_a_relay_killed_between_its_commit_and_the_publish(
    cluster: Cluster, kind: str, committed: int, pause: float
) -> None:
    """What it has taken is looked at by the next relay after the pause that was committed with it."""
    runs = submit(cluster, 3, **({} if kind == "shared" else {"time_limit": 60}))
    with cluster.redis() as client:
        client.delete("celery")
    cluster.rows(LOOK)
    if kind == "due":
        cluster.rows("UPDATE byrd.steps SET sends = 0 WHERE status = 'ready'")
    assert run_script(cluster, _DIES_BEFORE_IT_PUBLISHES) == -signal.SIGKILL
    killed = time.monotonic()
    assert sends(cluster, solo=kind != "shared") == [committed] * 3
    assert queued(cluster) == []
    assert longest_pause(cluster) <= pause
    sweeper = Sweeper(cluster.app(APP).engine.runtime, Settings())
    sweeper.start()
    try:
        wait_until(lambda: len(queued(cluster)) == 3, what="the next relay's messages")
        log.info("%s: sent by the next relay %.1f s after the first was killed", kind, time.monotonic() - killed)
    finally:
        sweeper.stop()
    assert sends(cluster, solo=kind != "shared") == [committed + 1] * 3
    cluster.worker(APP)
    assert [run.get(timeout=30) for run in runs] == [1, 2, 3]
    check_database(cluster.database_url)


@pytest.fixture
def own(cluster_on: ClusterFactory, database_url: str, own_broker: EmbeddedValkey) -> Cluster:
    """A cluster whose Redis belongs to the test."""
    return cluster_on(database_url=database_url, broker_url=own_broker.url)


def test_two_relays_while_redis_refuses_and_one_is_killed(own: Cluster) -> None:
    """Neither takes a refused message for sent; what the dead one took is sent as soon as Redis takes it again."""
    know_broker(own)
    runs = submit(own, 3, time_limit=60)
    with own.redis() as client:
        client.delete("celery")
        fill(client)
        own.rows(LOOK)
        assert run_script(own, _DIES_BEFORE_IT_SAYS_SO) == -signal.SIGKILL
        assert longest_pause(own) <= 2 * RESEND_SECONDS
        with relays(own, 2):
            looked = "SELECT count(*) FROM byrd.steps WHERE status = 'ready' AND sends = 2 AND wake_at > now()"
            for _ in range(5):
                own.rows(LOOK)
                wait_until(lambda: own.rows(looked) == [(3,)], what="a look, and a refusal")
            assert longest_pause(own) <= RESEND_SECONDS
            client.delete("junk")
            wait_until(lambda: client.llen("celery") == 3, what="all to be sent")
            assert messages(own) == [1] * 3
            assert sends(own) == [3] * 3
    own.worker(APP)
    assert [run.get(timeout=30) for run in runs] == [1, 2, 3]
    check_database(own.database_url)
