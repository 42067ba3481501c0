"""The load: small tasks that leave an effect behind each time they run, and canvases of every kind made of them.

They touch nothing but the tables of :mod:`byrd.chaos.ledger`.  Workers get them from :mod:`byrd.chaos.load`.  Each
result says which attempt gave it, ``{"value": 12, "attempt": 1}``: all attempts at a step come to the same value, so
nothing else would tell that a stale one was recorded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from celery import Celery, Task, chain, chord, group
from sqlalchemy import Connection

from byrd.chaos import ledger
from byrd.errors import ConfigurationError
from byrd.task import CheckpointTask, Outcome, SagaTask
from byrd.task.attempt import Attempt, attempt_of

#: The queue of the load alone: what chaos does to messages it does there.
QUEUE = "byrd-chaos"
PREFIX = "byrd.chaos."
#: A step of the load works for up to this long, so that faults find it at work.
_LONGEST_SECONDS = 0.12
_ITEMS, _BATCH = 30, 3
_STUMBLES = 2


class RefusedError(Exception):
    """What the last step of each saga raises."""


# -- the tasks -------------------------------------------------------------------------------------

Given = int | Mapping[str, int]
"""A number: the caller's own, or the result of a task of the load."""


def touch(self: Task, value: Given) -> Given:
    """Work a little; return the next number."""
    attempt = _leave_effect(self)
    _work(value)
    return _result(attempt, number_of(value) + 1)


def gather(self: Task, values: list[Any]) -> Given:
    """Add up what a group returns, whatever its nesting."""
    attempt = _leave_effect(self)
    return _result(attempt, sum(_flat(values)))


def stumble(self: Task, value: Given) -> Given:
    """Ask for another try, twice."""
    attempt = _leave_effect(self)
    _work(value)
    if self.request.retries < _STUMBLES:
        raise self.retry(countdown=0.1, max_retries=_STUMBLES)
    return _result(attempt, number_of(value) + 1)


def grow(self: Task, value: Given) -> Any:
    """Put a chain in its own place."""
    _leave_effect(self)
    step = self.app.tasks[f"{PREFIX}touch"]
    raise self.replace(chain(step.s(value), step.s()))


def walk(self: CheckpointTask, value: Given) -> Given:
    """Write items in batches, each in one transaction with its checkpoint."""
    attempt = _leave_effect(self)

    def items(cursor: int | None) -> Iterator[tuple[int, int]]:
        return ((n, n) for n in range(0 if cursor is None else cursor + 1, _ITEMS))

    def process(item: int) -> int:
        time.sleep(_LONGEST_SECONDS / _BATCH)
        return item

    def save(conn: Connection, outcomes: list[Outcome]) -> None:
        ledger.record_items(conn, attempt.run_id, attempt.step_id, attempt.number, [o.item for o in outcomes])

    done = self.iterate(items, process, save=save, batch_size=_BATCH)
    return _result(attempt, number_of(value) + done.completed)


def reserve(self: Task, value: Given) -> Given:
    """Do what can be undone."""
    attempt = _leave_effect(self)
    _work(value)
    return _result(attempt, number_of(value) + 1)


def release(self: Task, result: Given, *_: Any) -> Given:
    """Undo it."""
    attempt = _leave_effect(self)
    _work(result)
    return _result(attempt, number_of(result))


def refuse(self: Task, value: Given) -> None:
    """Fail, so that what was reserved is released."""
    _leave_effect(self)
    raise RefusedError(f"{number_of(value)} is refused, as it should be")


def register(app: Celery) -> None:
    """Give the app the tasks of the load, and the route to their queue, once."""
    if f"{PREFIX}touch" in app.tasks:
        return
    routes = app.conf.task_routes or ()
    others = routes if isinstance(routes, list | tuple) else (routes,)
    app.conf.task_routes = ({f"{PREFIX}*": {"queue": QUEUE}}, *others)
    app.amqp.flush_routes()
    app.amqp.router = app.amqp.Router()

    def task(fun: Callable[..., Any], **options: Any) -> Any:
        name = PREFIX + fun.__name__
        return app.task(fun, name=name, bind=True, shared=False, lazy=False, ignore_result=False, **options)

    for plain in (touch, gather, stumble, grow, refuse):
        task(plain)
    task(walk, base=CheckpointTask)
    task(reserve, base=SagaTask).compensation(release, bind=True, retry_backoff=1, retry_backoff_max=2)


def _leave_effect(task: Task) -> Attempt:
    """Write an effect, for good, at the start of each attempt; wait for Postgres as long as it takes."""
    attempt = attempt_of(task.request)
    if attempt is None:
        raise ConfigurationError(f"{task.name} is a part of `byrd chaos`, and no task to be called by itself")
    attempt.runtime.user_store.run(
        ledger.record_effect,
        ledger.new_effect(),
        attempt.run_id,
        attempt.step_id,
        attempt.number,
        worker_id=attempt.runtime.worker_id,
        pid=os.getpid(),
    )
    return attempt


def _result(attempt: Attempt, value: int) -> Given:
    return {"value": value, "attempt": attempt.number}


def number_of(given: Given) -> int:
    """Return the number that a task of the load was given, or has returned."""
    return given if isinstance(given, int) else given["value"]


def _work(value: Given) -> None:
    time.sleep(_LONGEST_SECONDS * (number_of(value) * 7919 % 100) / 100)


def _flat(values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield number_of(value)


# -- the canvases ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """A canvas of the load: how to build it from a number, and what must come of it."""

    name: str
    build: Callable[[int], Any]
    #: The value that the run's result must have; None for a run that must fail, and roll back.
    expected: Callable[[int], int] | None
    #: How many compensations must have succeeded.
    undone: int = 0

    @property
    def workflow(self) -> str:
        """The name under which its runs are listed."""
        return PREFIX + self.name


def shapes(app: Celery) -> list[Shape]:
    """Return the canvases of the load, made of the tasks of this app."""
    tasks = {
        name: app.tasks[PREFIX + name] for name in ("touch", "gather", "stumble", "grow", "walk", "reserve", "refuse")
    }
    step, total, reserving = tasks["touch"], tasks["gather"], tasks["reserve"]

    def nested(n: int) -> Any:
        inner = chord([step.s(), step.s(), step.s()], total.s())
        return chain(step.s(n), group(chain(step.s(), step.s()), inner, step.s()), total.s(), step.s())

    return [
        Shape("chain", lambda n: chain(step.s(n), step.s(), step.s()), lambda n: n + 3),
        Shape("chord", lambda n: chord([step.s(n + i) for i in range(5)], total.s()), lambda n: 5 * n + 15),
        Shape("nested", nested, lambda n: (n + 3) + 3 * (n + 2) + (n + 2) + 1),
        Shape("retries", lambda n: chain(tasks["stumble"].s(n), step.s()), lambda n: n + 2),
        Shape("replace", lambda n: chain(tasks["grow"].s(n), step.s()), lambda n: n + 3),
        Shape("checkpoints", lambda n: chain(tasks["walk"].s(n), step.s()), lambda n: n + _ITEMS + 1),
        Shape("rollback", lambda n: chain(reserving.s(n), reserving.s(), tasks["refuse"].s()), None, undone=2),
    ]


#: How many items each step of a ``checkpoints`` run writes.
ITEMS = _ITEMS
