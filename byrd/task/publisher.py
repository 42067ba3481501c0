"""Publishes wake-ups: small messages that name a step.  Losing one costs time only; the relay sends it again."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

from celery import Celery
from kombu.exceptions import OperationalError
from sqlalchemy.exc import DBAPIError

from byrd.errors import NotLiveError
from byrd.model import PROTOCOL_VERSION
from byrd.store import Wakeup
from byrd.store.rows import Consumers
from byrd.task import idle

log = logging.getLogger(__name__)

#: Options of a step that are not properties of its message.
_NOT_SENT = frozenset({"retry", "retry_policy", "ignore_result", "serializer", "immutable", "task_type", "route_name"})

#: In place of keyword arguments.  A worker without Byrd must not run the task, whatever arguments that one takes:
#: Celery refuses a call whose keyword arguments are no mapping.
_NO_CALL = "byrd_step: this message names a step of a run, and is no call of the task"

#: For so long after a failure nobody tries to publish: a broker that hangs costs five seconds each time, and whoever
#: submits much meanwhile, beat say, would fall behind.
_AWAY_SECONDS = 1.0
#: For so long after a failure nobody offers anything, or waits for an offer.
_DEAF_SECONDS = 1.0

#: So many wake-ups one after the other are enough, or one for each process that might take them: whoever takes one goes
#: on with what else is ready, and sees that others are woken while there is more.
_ENOUGH = 16
#: For so long it is remembered who consumes a queue, and that nobody does.
_CONSUMERS_SECONDS, _NO_CONSUMERS_SECONDS = 3.0, 0.2
#: More than that are never wanted at once.
_MANY = 1_000_000
#: For so long it is remembered that a queue had room.
_ROOM_SECONDS = 0.5
#: A worker's main process takes messages one after the other, and needs this long for each, at the very least.  On a
#: usual machine plain Celery needs a millisecond, and a wake-up that finds nothing takes a worker three.
_TAKING_SECONDS = 0.0005
#: What a queue that nobody is known to consume holds will stay there for so long.
_NOBODY_SECONDS = 0.02
#: In a queue of no more messages than this, it is looked which are there; of a longer one, it is known how many.
MOST_READ = 500
#: Nor is it looked when all of them are larger than this: whoever else uses the queue may put large messages there.
_MOST_BYTES = 8_000_000
#: In the header of a wake-up for a step that needs no message of its own: whoever takes it may run others, too.
SHARED = "byrd_shared"
_SHARED = f'"{SHARED}": true'.encode()
#: What a message says of its step, as ``_send`` writes it: the step's id, and its attempts so far.
_STEP = re.compile(rb'"step": "((?:[^"\\]|\\.)*)", "no": \d+, "attempt": (\d+)')


class _Enough(NamedTuple):
    """How many wake-ups are enough for a queue, for so many processes, and how many seconds it takes to take them."""

    wakeups: int
    processes: int
    seconds: float


#: Each step has one.
_ALL = _Enough(_MANY, _MANY, 0.0)


class Publisher:
    """Sends wake-ups to the queues that Celery's router chose for their steps."""

    def __init__(
        self,
        app: Celery,
        consumers: Callable[[str], Consumers] | None = None,
        *,
        line_up: Callable[[Sequence[Wakeup]], list[Wakeup]] = lambda limited: [*limited],
        database: str = "",
    ) -> None:
        self.app = app
        self._keys = idle.Keys(database)
        self._line_up = line_up
        #: Asks who consumes a queue; without it, each step gets a message of its own.
        self._ask_consumers = consumers
        #: For each queue, what is enough for its consumers, and when they were asked for.
        self._consumers: dict[str, tuple[_Enough, float]] = {}
        self._complained = self._away_until = self._deaf_until = 0.0
        #: For each queue, for how many wake-ups there is still room, and until when that is so; then it is not known.
        self._room: dict[str, tuple[int, float]] = {}

    def publish(self, wakeups: Iterable[Wakeup], *, offer: bool = True) -> bool:
        """Publish the wake-ups that are due; tell whether all went out.

        ``offer``: those of steps that need no message of their own are offered first to processes that are idle.

        Never raises for a broker that is away: the steps stay ready in Postgres and are sent again.  A step that needs
        no message of its own gets none while the newest messages of its queue are wake-ups enough: whoever takes them
        finds it.  The step is committed by now, so none of these is taken too early for that.
        """
        due = [wakeup for wakeup in wakeups if wakeup.due]
        if limited := [wakeup for wakeup in due if wakeup.limited]:
            due = [wakeup for wakeup in due if not wakeup.limited] + self._in_line(limited)
        if not due:
            return True
        if time.monotonic() < self._away_until:
            return False
        try:
            due = self._not_known_to_be_vain(due)
            if not due:
                return True
            with self.app.producer_pool.acquire(block=True, timeout=5) as producer:
                # Else kombu would try for six seconds to reach a broker that refuses.
                producer.connection.ensure_connection(max_retries=0, timeout=5)
                wanted = self._wanted(producer, due)
                if offer:  # only these: where enough wake-ups wait, no process does
                    wanted = self._untaken(producer, wanted)
                with _batch(producer, len(wanted)):
                    failed = [wakeup for wakeup in wanted if not self._sent(producer, wakeup)]
        except Exception as exc:  # noqa: BLE001 - each transport has errors of its own, and none of them loses work
            self._complain("the broker does not take wake-ups now (%r); the relay will send them again", exc)
            self._away_until = time.monotonic() + _AWAY_SECONDS
            return False
        return not failed

    def _in_line(self, limited: list[Wakeup]) -> list[Wakeup]:
        """Have steps whose tasks have limits wait for their turn, each in its line; return those whose turn it is.

        Else each would have to be claimed by a worker to learn that it has to wait, and keep others from it meanwhile.
        """
        try:
            return self._line_up(limited)
        except (NotLiveError, DBAPIError) as exc:  # a worker may take them, and have them wait
            self._complain("Postgres does not answer (%r); what waits for a limit is sent instead", exc)
            return limited

    def _not_known_to_be_vain(self, due: list[Wakeup]) -> list[Wakeup]:
        """Leave out the wake-ups that nobody needs as far as one knows without the broker."""
        full = {wakeup.queue for wakeup in due if not wakeup.solo and self._is_full(wakeup.queue)}
        return [wakeup for wakeup in due if wakeup.solo or wakeup.queue not in full] if full else due

    def _is_full(self, queue: str) -> bool:
        room, until = self._room.get(queue, (0, 0.0))
        return room == 0 and time.monotonic() < until and self._enough(queue).wakeups < _MANY

    def _untaken(self, producer: Any, due: list[Wakeup]) -> list[Wakeup]:
        """Offer wake-ups to the processes that wait for them; return those that are still to be published."""
        if time.monotonic() < self._deaf_until or all(wakeup.solo for wakeup in due) or not _is_redis(producer):
            return due
        offers: dict[str, list[Wakeup]] = {}
        for wakeup in due:
            if not wakeup.solo:
                offers.setdefault(wakeup.queue, []).append(wakeup)
        taken: set[str] = set()
        channel = producer.connection.default_channel
        for queue, wakeups in offers.items():
            enough = self._enough(queue)
            some = wakeups[: enough.processes if enough.wakeups < _MANY else 0]
            if some:
                taken |= {wakeup.id for wakeup in some[: len(some) - self._left(channel, queue, some)]}
        return [wakeup for wakeup in due if wakeup.id not in taken] if taken else due

    def _left(self, channel: Any, queue: str, wakeups: list[Wakeup]) -> int:
        """Offer wake-ups; return how many of them, the last ones, nobody has taken."""
        try:
            return idle.offer(channel.client, self._keys.queue(_prefix(channel), queue), wakeups)
        except Exception as exc:  # noqa: BLE001 - of a broker that allows only what kombu needs, say
            self._complain("the broker takes no offers (%r); for a while, messages are sent at once", exc)
            self._deaf_until = time.monotonic() + _DEAF_SECONDS
            return len(wakeups)  # somebody may have taken some of them: a message too many does no harm

    def takes_offers(self) -> bool:
        """Tell whether it is worth while to wait for offers: the broker is a Redis, and answered when last asked."""
        return time.monotonic() >= max(self._away_until, self._deaf_until) and self._can_offer

    @cached_property
    def _can_offer(self) -> bool:
        with self.app.connection_for_write() as connection:
            return bool(connection.get_transport_cls().driver_type == "redis")

    def wait_for_offer(self, queues: Iterable[str], worker_id: str, seconds: float) -> Any:
        """Wait for a step that is offered to this process instead of being published; return it as it was written.

        None when there is none.
        """
        try:
            with self._channel() as channel:
                prefix = _prefix(channel)
                keys = [self._keys.worker(prefix, worker_id), *(self._keys.queue(prefix, queue) for queue in queues)]
                return idle.wait(channel.client, keys, seconds)
        except Exception as exc:  # noqa: BLE001 - each transport has errors of its own
            self._complain("the broker takes no offers (%r); for a while, this process waits for messages only", exc)
            self._deaf_until = time.monotonic() + _DEAF_SECONDS
            return None

    @contextmanager
    def _channel(self) -> Iterator[Any]:
        with self.app.producer_pool.acquire(block=True, timeout=5) as producer:
            producer.connection.ensure_connection(max_retries=0, timeout=5)
            yield producer.connection.default_channel

    def cease_to_wait(self, worker_id: str) -> None:
        """Have the process of a worker that waits for an offer wait no longer."""
        if not self.takes_offers():
            return
        try:
            with self._channel() as channel:
                idle.cease(channel.client, self._keys.worker(_prefix(channel), worker_id))
        except Exception as exc:  # noqa: BLE001 - each transport has errors of its own
            self._complain("the broker does not answer (%r); a message waits until a process has ceased to wait", exc)
            self._deaf_until = time.monotonic() + _DEAF_SECONDS

    def _wanted(self, producer: Any, due: list[Wakeup]) -> list[Wakeup]:
        """Leave out the wake-ups that nobody needs."""
        if all(wakeup.solo for wakeup in due) or not _is_redis(producer):
            return due
        left: dict[str, tuple[int, float]] = {}
        wanted = []
        for wakeup in due:
            if not wakeup.solo:
                queue = wakeup.queue
                room, until = left[queue] if queue in left else self._remembered(producer, queue)
                if room == 0:
                    left[queue] = 0, until
                    continue
                left[queue] = room - 1, until if room > 1 else 0.0  # the last of it: the next one is looked for
            wanted.append(wakeup)
        self._room.update(left)
        return wanted

    def _remembered(self, producer: Any, queue: str) -> tuple[int, float]:
        """Return how many wake-ups there is room for, and until when that is so, by the monotonic clock."""
        enough = self._enough(queue)
        if enough.wakeups >= _MANY:
            return enough.wakeups, 0.0
        room, until = self._room.get(queue, (0, 0.0))
        now = time.monotonic()
        if now >= until:
            room, newest_is_one = self._look(producer.connection.default_channel, queue, enough.wakeups)
            if room > 0:  # they are taken, so there will not be less for a while, but for what others put there
                until = now + _ROOM_SECONDS
            elif newest_is_one:  # nothing needs another one until all messages may have been taken
                until = now + enough.seconds
        return room, until

    def _look(self, channel: Any, queue: str, enough: int) -> tuple[int, bool]:
        """Return how many wake-ups there is room for, as the queue in Redis tells, and whether its newest is one, too.

        It is long enough when the message that stands so far from its newest end is a wake-up: whoever takes that finds
        what is committed by now, and wakes others while there is more.  What is committed later is found by whoever
        takes the newest, and to take all that is before that takes its time, whatever it is.
        """
        key = f"{_prefix(channel)}{queue}"
        with channel.client.pipeline(transaction=False) as pipe:
            newest, oldest = pipe.lindex(key, 0).lindex(key, enough - 1).execute()
        if oldest is None:
            return max(1, enough - int(channel.client.llen(queue))), False  # kombu prefixes this one by itself
        if _SHARED not in oldest:
            return 1, False
        return 0, newest is not None and _SHARED in newest  # None: it was empty a moment before

    def _enough(self, queue: str) -> _Enough:
        """Return what is enough for a queue, as its consumers are; those of threads need a wake-up for each step."""
        enough, since = self._consumers.get(queue, (None, 0.0))
        if enough is None or time.monotonic() - since > (
            _CONSUMERS_SECONDS if enough.processes else _NO_CONSUMERS_SECONDS
        ):
            enough = self._ask(queue)
            self._consumers[queue] = (enough, time.monotonic())
        return enough

    def _ask(self, queue: str) -> _Enough:
        if self._ask_consumers is None:
            return _ALL
        try:
            processes, all_share, workers = self._ask_consumers(queue)
        except (NotLiveError, DBAPIError) as exc:
            log.debug("who consumes %s is not known: %s", queue, exc)
            return _ALL
        if not all_share:
            return _ALL
        wakeups = max(_ENOUGH, processes)
        return _Enough(wakeups, processes, _TAKING_SECONDS * wakeups / workers if workers else _NOBODY_SECONDS)

    def room(self, queue: str) -> int | None:
        """Return for how many wake-ups of steps that need no message of their own there is room in a queue.

        None: each has one nevertheless, for what consumes the queue.
        """
        try:
            with self.app.producer_pool.acquire(block=True, timeout=5) as producer:
                enough = self._enough(queue).wakeups
                if not _is_redis(producer) or enough >= _MANY:
                    return None
                producer.connection.ensure_connection(max_retries=0, timeout=5)
                self._room.pop(queue, None)  # what is published now is published upon this answer
                return self._look(producer.connection.default_channel, queue, enough)[0]
        except Exception as exc:  # noqa: BLE001 - each transport has errors of its own
            self._complain("the broker does not answer (%r); the relay will ask again", exc)
            return 0

    def depth(self, queue: str) -> int | None:
        """Return how many messages wait in a queue of the broker; None when it does not say."""
        try:
            return self.count(queue)
        except Exception as exc:  # noqa: BLE001 - each transport has errors of its own
            self._complain("the broker does not answer (%r); the relay will ask again", exc)
            return None

    def count(self, queue: str) -> int:
        """Return how many messages wait in a queue of the broker; raise the transport's error when it is away."""
        with self.app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=0, timeout=5)
            channel = connection.default_channel
            try:
                return int(channel.queue_declare(queue=queue, passive=True).message_count)
            except connection.channel_errors:
                return 0  # a queue that was never declared holds nothing

    def missing(self, queue: str, attempts: Mapping[str, int]) -> list[str] | None:
        """Return the steps of which no message waits in a queue of the broker; None when it does not say, or too much.

        ``attempts``: of each step, the number of its attempts so far, for a message of an earlier one wakes up nobody.
        """
        try:
            with self.app.producer_pool.acquire(block=True, timeout=5) as producer:
                if not _is_redis(producer):
                    return None
                producer.connection.ensure_connection(max_retries=0, timeout=5)
                channel = producer.connection.default_channel
                # Each priority has a list of its own.
                keys = [f"{_prefix(channel)}{channel._q_for_pri(queue, step)}" for step in channel.priority_steps]
                with channel.client.pipeline(transaction=False) as pipe:
                    for key in keys:
                        pipe.memory_usage(key, samples=50)
                    if sum(size or 0 for size in pipe.execute()) > _MOST_BYTES:
                        return None
                    for key in keys:
                        pipe.lrange(key, 0, MOST_READ)
                    lists = pipe.execute()
                if any(len(messages) > MOST_READ for messages in lists):
                    return None
        except Exception as exc:  # noqa: BLE001 - each transport has errors of its own
            self._complain("the broker does not answer (%r); the relay will ask again", exc)
            return None
        held = {found.groups() for messages in lists for message in messages for found in _STEP.finditer(message)}
        return [
            step_id
            for step_id, attempt in attempts.items()
            if (json.dumps(step_id)[1:-1].encode(), str(attempt).encode()) not in held
        ]

    def is_marked(self, mark: str, *, leave: bool = False) -> bool | None:
        """Tell whether the broker holds a mark, or ``leave`` it there; None when it does not say.

        A broker that has lost its mark was flushed, or came back without its data.  Only Redis can hold one.
        """
        try:
            with self.app.producer_pool.acquire(block=True, timeout=5) as producer:
                if not _is_redis(producer):
                    return None
                producer.connection.ensure_connection(max_retries=0, timeout=5)
                client = producer.connection.default_channel.client
                return bool(client.set(mark, "1") if leave else client.exists(mark))
        except Exception as exc:  # noqa: BLE001 - each transport has errors of its own
            self._complain("the broker does not answer (%r); the relay will ask again", exc)
            return None

    def _sent(self, producer: Any, wakeup: Wakeup) -> bool:
        """Send one wake-up; one that can never be sent (its queue is unknown, say) must not hold up the others."""
        try:
            self._send(producer, wakeup)
        except Exception as exc:  # whatever a router, a queue or a signal's receiver raises
            connection = producer.connection
            broker_errors = (*connection.connection_errors, *connection.channel_errors, OperationalError)
            # kombu counts KeyError among Redis' connection errors, but here it is a queue that nobody has configured.
            if isinstance(exc, broker_errors) and not isinstance(exc, KeyError):
                raise
            self._complain(f"the wake-up of step {wakeup.id} ({wakeup.task}) cannot be sent: %r", exc)
            return False
        return True

    def _complain(self, message: str, exc: Exception) -> None:
        if time.monotonic() - self._complained > 10:
            self._complained = time.monotonic()
            log.warning(message, exc)

    def _send(self, producer: Any, wakeup: Wakeup) -> None:
        options = {k: v for k, v in json.loads(wakeup.options).items() if k not in _NOT_SENT}
        headers = dict(options.pop("headers", None) or {})
        headers["byrd"] = {
            "v": PROTOCOL_VERSION,
            "run": wakeup.run_id,
            "step": wakeup.id,
            "no": wakeup.no,
            "attempt": wakeup.attempt,
        }
        if not wakeup.solo:
            headers["byrd"][SHARED] = True
        amqp = self.app.amqp
        stamped = options.get("stamped_headers") or []
        message = amqp.as_task_v2(
            wakeup.id,
            wakeup.task,
            args=(),
            kwargs={},
            group_id=wakeup.group_id,
            group_index=wakeup.join_pos,
            retries=wakeup.retries,
            root_id=wakeup.run_id,
            parent_id=wakeup.parent_id,
            time_limit=options.pop("time_limit", None),
            soft_time_limit=options.pop("soft_time_limit", None),
            shadow=options.pop("shadow", None),
            argsrepr=f"run {wakeup.run_id}, step {wakeup.no}",
            kwargsrepr="",
            stamped_headers=options.pop("stamped_headers", None),
            create_sent_event=self.app.conf.task_send_sent_event,
            **{name: options.pop(name) for name in stamped if name in options},
        )
        _, _, embedded = message.body
        message = message._replace(body=((), _NO_CALL, embedded))
        target: dict[str, Any] = {"queue": wakeup.queue}
        if "exchange" in options:
            target = {k: options.pop(k) for k in ("exchange", "routing_key", "exchange_type") if k in options}
        amqp.send_task_message(
            producer, wakeup.task, message, **target, headers=headers, retry=False, serializer="json",
            **{k: v for k, v in options.items() if k in _PROPERTIES},
        )  # fmt: skip


def _is_redis(producer: Any) -> bool:
    return bool(producer.connection.transport.driver_type == "redis")


def _prefix(channel: Any) -> str:
    """Return what kombu puts before the names of queues, in some of its commands."""
    return getattr(channel, "global_keyprefix", "") or ""


def _batch(producer: Any, messages: int) -> AbstractContextManager[Any]:
    """Return a context in which messages go out a hundred per round trip, where kombu (5.7) and the transport can."""
    batch = getattr(producer, "batch", None)
    return batch(max_size=100) if batch is not None and messages > 1 else nullcontext()


_PROPERTIES = frozenset({"priority", "delivery_mode", "compression", "reply_to"})
