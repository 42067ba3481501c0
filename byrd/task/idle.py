"""Offers a ready step to a pool process that has just run out of work, so that it needs no message.

A message takes three milliseconds from whoever sends it to the process that runs its step, most of them in kombu and in
Celery's main process.  So a process whose slice has run out of work waits in Redis for what is left of it, and a
wake-up is offered to those that wait before it is published.  Redis gives it to one of them or to nobody, and says
which.  What was given to a process that dies is sent again by the relay, as a message is that is lost.

Of a worker one process waits so, and only while another is free: what else is in its queues must find a process, too,
and with ``worker_disable_prefetch`` Celery's main process fetches nothing while it counts as many messages as it has
processes.  When it comes to that, the one that waits is told to cease.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Sequence
from typing import Any

import redis
from redis.client import Pipeline

from byrd.model import PROTOCOL_VERSION
from byrd.store import Wakeup

#: What nobody has taken out of Redis, because whoever put it there is gone, is forgotten after this time.
_KEPT_MS = 1000
#: Redis looks at its clock ten times a second: so much later than asked for it may say that there was nothing.
_LATE_SECONDS = 0.3


class Idle:
    """Whether a process of this worker waits for offers, and whether another one is free.

    In memory that pool processes inherit from the worker that forks them.
    """

    def __init__(self) -> None:
        #: Until when one waits, whether another is free, and which it is that waits.
        self._page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")

    def begin(self, seconds: float) -> bool:
        """Say that this process waits from now on; return False if it must not."""
        if self.waits() or not self._page[1]:
            return False
        self._page[2] = os.getpid()
        self._page[0] = time.monotonic() + seconds + _LATE_SECONDS
        if self._page[1] and self._page[2] == os.getpid():
            return True
        self.end()  # a message that came just now may not have seen that this process waits, or another begins, too
        return False

    def end(self) -> None:
        """Say that it does not any more."""
        if self._page[2] == os.getpid():
            self._page[0] = 0.0

    def waits(self) -> bool:
        """True while a process waits."""
        return self._page[0] > time.monotonic()

    def note_free(self, *, free: bool) -> None:
        """Say whether another process is free: the main process does, before it looks whether one waits."""
        self._page[1] = free


class Keys:
    """The lists in Redis: of what is offered to whoever waits for a queue, and for the one of a worker that waits.

    ``database``: its name, for several may share a broker.
    """

    def __init__(self, database: str) -> None:
        self._of = f"{PROTOCOL_VERSION}.{database}"

    def queue(self, prefix: str, name: str) -> str:
        """Return the key of a queue's list; ``prefix``: what kombu puts before all keys."""
        return f"{prefix}byrd.offers.{self._of}.{name}"

    def worker(self, prefix: str, worker_id: str) -> str:
        """Return the key of a worker's list."""
        return f"{prefix}byrd.cease.{worker_id}"


def offer(client: Any, key: str, wakeups: Sequence[Wakeup]) -> int:
    """Offer wake-ups to the processes that wait for a queue; return how many of them nobody has taken.

    Others may offer at the same time, and take back mine for theirs: what counts is how many, for whoever wakes up for
    a step of a queue finds the others.
    """
    offers = [json.dumps({"step": one.id, "attempt": one.attempt, "task": one.task}) for one in wakeups]
    with _pipeline(client) as pipe:
        left = pipe.lpush(key, *offers).rpop(key, len(offers)).pexpire(key, _KEPT_MS).execute()[1]
    return len(left or ())


def wait(client: Any, keys: Sequence[str], seconds: float) -> Any:
    """Wait for so many seconds, or a little longer; return what is offered: a step, its attempts so far, and its task.

    None if there was nothing, or this process is to cease.  What others than :func:`offer` wrote may be anything.

    ``keys``: of the worker's list, and of its queues'.
    """
    pool = client.connection_pool
    # Not by the client: while Redis is away that would try again, for seconds.
    connection = pool.get_connection() if redis.VERSION >= (5, 3) else pool.get_connection("BRPOP")
    try:
        connection.send_command("BRPOP", *keys, seconds)
        if not connection.can_read(timeout=seconds + _LATE_SECONDS):
            connection.disconnect()
            return None
        answer = connection.read_response()
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)
    try:
        return json.loads(answer[1]) if answer is not None else None
    except ValueError:
        return None


def cease(client: Any, key: str) -> None:
    """Have the process of a worker that waits for offers wait no longer."""
    with _pipeline(client) as pipe:
        pipe.lpush(key, "").pexpire(key, _KEPT_MS).execute()


def _pipeline(client: Any) -> Any:
    """Return a pipeline that prefixes nothing: kombu's own prefixes the keys of some commands, by its version."""
    return Pipeline(client.connection_pool, client.response_callbacks, transaction=False, shard_hint=None)
