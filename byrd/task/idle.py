"""Offers a ready step to a pool process that has just run out of work, so that it needs no message.

A message takes three milliseconds from whoever sends it to the process that runs its step, most of them in kombu and in
Celery's main process.  So a process whose slice has run out of work waits in Redis for what is left of it, and a
wake-up is offered to those that wait before it is published.  Redis gives it to one of them or to nobody, and says
which.  What was given to a process that dies is sent again by the relay, as a message is that is lost.

Of a worker no more than one process waits so, and only while another is free: what else is in its queues must find a
process, too, and Celery's main process fetches nothing while it counts as many messages as it has processes.  When it
comes to that, it has the one that waits cease.
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterable, Sequence
from typing import Any

import redis

from byrd.store import Wakeup
from byrd.store.work import Own

#: Lists in Redis: of what is offered to whoever waits for a queue; and for the one process of a worker that waits.
_QUEUE, _WORKER = "byrd:offers:", "byrd:cease:"
#: A word to cease that nobody heard is forgotten after this time.
_CEASE_MS = 1000
#: Redis looks at its clock ten times a second: so much later than asked for it may say that there was nothing.
_LATE_SECONDS = 0.3


class Idle:
    """Whether a process of this worker waits for offers, and whether another one is free.

    In memory that pool processes inherit from the worker that forks them.
    """

    def __init__(self) -> None:
        self._page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("d")

    def begin(self, seconds: float) -> bool:
        """Say that this process waits from now on; return False if it must not."""
        if self.waits() or not self._page[1]:
            return False
        self._page[0] = time.monotonic() + seconds + _LATE_SECONDS
        if not self._page[1]:  # a message that came just now may not have seen that this process waits
            self.end()
            return False
        return True

    def end(self) -> None:
        """Say that it does not any more."""
        self._page[0] = 0.0

    def waits(self) -> bool:
        """True while a process waits."""
        return self._page[0] > time.monotonic()

    def note_free(self, *, free: bool) -> None:
        """Say whether another process is free: the main process does, before it looks whether one waits."""
        self._page[1] = free


def offer(client: Any, queue: str, wakeups: Sequence[Wakeup]) -> list[Wakeup]:
    """Offer wake-ups to the processes that wait for the queue; return those that nobody has taken.

    Others may offer at the same time, and take back mine for theirs: what counts is how many, for whoever wakes up for
    a step of a queue finds the others.
    """
    key = f"{_QUEUE}{queue}"
    offers = [json.dumps([wakeup.id, wakeup.attempt, wakeup.task]) for wakeup in wakeups]
    with client.pipeline(transaction=False) as pipe:
        left = pipe.lpush(key, *offers).rpop(key, len(offers)).execute()[1]
    return [*wakeups[len(wakeups) - len(left) :]] if left else []


def wait(client: Any, prefix: str, queues: Iterable[str], worker_id: str, seconds: float) -> Own | None:
    """Wait for an offer, for so many seconds or a little longer; return None if there was none, or this is to cease."""
    pool = client.connection_pool
    # Not by the client: while Redis is away that would try again, for seconds.
    connection = pool.get_connection() if redis.VERSION >= (5, 3) else pool.get_connection("BRPOP")
    try:
        keys = [f"{prefix}{_WORKER}{worker_id}", *(f"{prefix}{_QUEUE}{queue}" for queue in queues)]
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
    if answer is None or _text(answer[0]) == keys[0]:
        return None
    step_id, attempt, task = json.loads(answer[1])
    return Own(step_id, attempt, task)


def cease(client: Any, worker_id: str) -> None:
    """Have the process of a worker that waits for offers wait no longer."""
    key = f"{_WORKER}{worker_id}"
    with client.pipeline(transaction=False) as pipe:
        pipe.lpush(key, "").pexpire(key, _CEASE_MS).execute()


def _text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)
